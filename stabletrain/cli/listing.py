"""Output of ``stabletrain ls`` and ``stabletrain show``, from files alone: no plugin is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import yaml

from stabletrain.config import discovery
from stabletrain.config.discovery import Option, PluginInfo
from stabletrain.config.problems import suggestion
from stabletrain.config.yaml_file import read_text
from stabletrain.errors import UserError

_TABLES = ("recipes", "plugins", "slots", "groups")

_GROUPS = {
    "model": "Which LightningModule is trained?",
    "data": "On which data?",
    "optimizer": "Which optimizer, in place of the module's own?",
    "schedule": "How does the learning rate change during the run?",
    "precision": "In which number formats is computed?",
    "strategy": "How is the work divided between devices?",
    "trainer": "Which arguments does Lightning's Trainer get?",
    "logger": "Where are metrics, parameters and artifacts recorded?",
    "launch": "Where and how are the training processes started?",
    "debug": "How is a recipe scaled down, to see that it runs? (+debug=OPTION)",
    "chaos": "Which fault is made on purpose, to see what the plugins do? (+chaos=OPTION)",
}
"""What the options of a group answer; slots have their question in none.yaml."""


def print_tables(what: str) -> None:
    """Print the tables of recipes, plugins, slots, and the other config groups.

    Args:
        what: ``recipes``, ``plugins``, ``slots``, ``groups`` or ``all``.

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
    chosen = discovery.default_options()
    if what in ("slots", "all"):
        slots = [
            _answers(slot.name, slot.question, slot.options, chosen.get(f"{discovery.SLOTS}/{slot.name}", "none"))
            for slot in discovery.slots().values()
        ]
        _print_table("slots: plugins/SLOT=OPTION", ("slot", "default", "question and options"), slots)
    if what in ("groups", "all"):
        others = [
            _answers(name, group_sentence(name, options), list(options.values()), chosen.get(name, ""))
            for name, options in discovery.groups().items()
            if not name.startswith(f"{discovery.SLOTS}/")
        ]
        _print_table("groups: GROUP=OPTION", ("group", "default", "question and options"), others)


def group_sentence(name: str, options: Mapping[str, Option]) -> str:
    """Return one sentence on a config group: what its options answer.

    Args:
        name: of the group.
        options: of the group, by name.
    """
    return _GROUPS.get(name) or (options["none"].summary if "none" in options else "")


def _answers(name: str, question: str, options: Sequence[Option], default: str) -> tuple[str, str, str]:
    return name, default, "\n".join(filter(None, (question, " ".join(option.name for option in options))))


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
        slot = slots.get(group.removeprefix(f"{discovery.SLOTS}/")) if group.startswith(discovery.SLOTS) else None
        print(f"{name}: {slot.question if slot is not None else group_sentence(name, groups[group])}")
        if default := discovery.default_options().get(group):
            print(f"default: {default}")
        print()
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

    print(f"{plugin.name}: a {plugin.kind} of {plugin.distribution}, in\n{plugin.folder}")
    for option in plugin.options:
        _print_option(option)
    if plugin.card is not None:
        print()
        Console().print(Markdown(plugin.card.read_text(encoding="utf-8", errors="replace")))


def _print_option(option: Option) -> None:
    print(f"\n{_choice(option)}\n{option.file}")
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
