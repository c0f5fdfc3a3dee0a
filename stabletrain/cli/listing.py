"""Output of ``stabletrain ls`` and ``stabletrain show``, from files alone: no plugin is imported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import yaml

from stabletrain.config import discovery
from stabletrain.config.discovery import Option, PluginInfo
from stabletrain.config.problems import suggestion
from stabletrain.config.yaml_file import read_text
from stabletrain.errors import UserError

_TABLES = ("recipes", "plugins", "slots")


def print_tables(what: str) -> None:
    """Print the tables of recipes, plugins and slots.

    Args:
        what: ``recipes``, ``plugins``, ``slots`` or ``all``.

    Raises:
        UserError: for any other value.
    """
    if what not in (*_TABLES, "all"):
        raise UserError(f"ls: there is no table {what!r}{suggestion(what, (*_TABLES, 'all'))}")
    if what in ("recipes", "all"):
        rows = [(recipe.name, recipe.summary) for recipe in discovery.recipes().values()]
        _print_table("recipes: stabletrain train NAME", ("recipe", "what it trains"), rows)
    if what in ("plugins", "all"):
        plugins = discovery.plugins().values()
        entries = [(p.name, p.kind, " ".join(map(_choice, p.options)), p.distribution) for p in plugins]
        _print_table("plugins: stabletrain show NAME", ("plugin", "kind", "selected by", "distribution"), entries)
    if what in ("slots", "all"):
        found = discovery.slots().values()
        questions = [(slot.name, slot.question, " ".join(option.name for option in slot.options)) for slot in found]
        _print_table("slots: plugins/SLOT=OPTION", ("slot", "question", "options"), questions)


def print_details(name: str, overrides: Sequence[str]) -> None:
    """Print the details of a recipe, plugin, slot, group or option.

    Args:
        name: of any of them; an option is written ``zscore`` or ``plugins/clip/zscore``.
        overrides: Hydra overrides of a recipe.

    Raises:
        UserError: if nothing has that name.
    """
    groups, plugins, slots = discovery.groups(), discovery.plugins(), discovery.slots()
    options = [option for found in groups.values() for option in found.values() if option.name == name]
    options = options or [o for found in groups.values() for o in found.values() if f"{o.group}/{o.name}" == name]
    owners = [plugin for plugin in plugins.values() if any(option in plugin.options for option in options)]
    if name in discovery.recipes() or name.endswith((".yaml", ".yml")):
        _print_recipe(name, overrides)
    elif name in plugins:
        _print_plugin(plugins[name])
    elif name in slots or name in groups:
        group = name if name in groups else f"{discovery.SLOTS}/{name}"
        slot = slots.get(group.removeprefix(f"{discovery.SLOTS}/"))
        if slot is not None:
            print(f"{slot.name}: {slot.question}\n")
        _print_table(f"{group}=OPTION", ("option", "summary"), [(o.name, o.summary) for o in groups[group].values()])
    elif len(owners) == 1 and name != "none":
        _print_plugin(owners[0])
    elif options:
        for option in options:
            _print_option(option)
    else:
        known = [*discovery.recipes(), *plugins, *slots, *groups, *{o for found in groups.values() for o in found}]
        hint = suggestion(name, known, list_all=False) or "; see `stabletrain ls`"
        raise UserError(f"show: there is no recipe, plugin, slot, group or option {name!r}{hint}")


def _print_recipe(name: str, overrides: Sequence[str]) -> None:
    from stabletrain.config.compose import compose
    from stabletrain.config.problems import ConfigError

    composed = compose(name, overrides)
    if composed.problems:
        raise ConfigError(composed.problems)
    chosen = " ".join(f"{group}={option}" for group, option in composed.choices.items())
    print(f"# {chosen}")
    print(yaml.safe_dump(composed.config, sort_keys=False, allow_unicode=True, width=120), end="")


def _print_plugin(plugin: PluginInfo) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    print(f"{plugin.name}: a {plugin.kind} of {plugin.distribution}, in {plugin.folder}")
    for option in plugin.options:
        _print_option(option)
    if plugin.card is not None:
        print()
        Console().print(Markdown(plugin.card.read_text(encoding="utf-8", errors="replace")))


def _print_option(option: Option) -> None:
    print(f"\n{_choice(option)}    {option.file}")
    for line in read_text(option.file).splitlines():
        print(f"    {line}")


def _choice(option: Option) -> str:
    return f"{option.group}={option.name}"


def _print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(head):
        table.add_column(column, no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table, "")
