"""The command line. Every command imports what it needs when it runs, so that ``--help`` and ``ls`` answer at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stabletrain.errors import UserError

if TYPE_CHECKING:
    from stabletrain.launch.launcher import LaunchRequest

app = typer.Typer(
    name="stabletrain",
    help="Train, and stay up: recipes, plugins against loss spikes and broken steps, every run kept in MLflow.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _complete(context: typer.Context, incomplete: str) -> list[str]:
    from stabletrain.cli.completion import complete

    return complete(context.params.get("words") or [], incomplete)


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A recipe's name or file, and Hydra overrides: group=option, key=value, ~key.",
        autocompletion=_complete,
        show_default=False,
    ),
]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", metavar="PACKAGE", help="A package of yours that the config may build things from."),
]
Multirun = Annotated[bool, typer.Option("-m", "--multirun", help="Expand a=1,2 into several runs.")]


@app.command()
def train(words: Words = None, multirun: Multirun = False, trust: Trust = None) -> None:
    """Run a recipe: stabletrain train char_gpt optimizer.lr=3e-3 plugins/clip=none."""
    from stabletrain.cli.summary import Printer, after, exit_code
    from stabletrain.launch.launcher import prepare, run

    request = _request(words, multirun, trust)
    jobs = prepare(request)
    if all(composed.config["dry_run"] for _, composed in jobs):
        _say_valid([composed.recipe for _, composed in jobs])
        return
    done = run(request, jobs, Printer())
    print(after(done), flush=True)
    raise typer.Exit(exit_code(done))


@app.command()
def validate(words: Words = None, multirun: Multirun = False, trust: Trust = None) -> None:
    """Compose a recipe and check it against every signature; all mistakes at once, nothing is trained."""
    from stabletrain.launch.launcher import prepare

    _say_valid([composed.recipe for _, composed in prepare(_request(words, multirun, trust))])


@app.command("ls")
def list_all(what: Annotated[str, typer.Argument(help="recipes, plugins, slots or all")] = "all") -> None:
    """List recipes, plugins and slots."""
    from stabletrain.cli.listing import list_tables

    list_tables(what)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A recipe, plugin, slot, group or option.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, for a recipe.")] = None,
) -> None:
    """Show a plugin's card, arguments and origin, a slot's answers, or a recipe's composed config."""
    from stabletrain.cli.listing import show_name

    show_name(name, overrides or [])


@app.command("cp")
def copy(
    recipe: Annotated[str, typer.Argument(help="The recipe to copy.")],
    target: Annotated[Path, typer.Argument(help="The new file, such as my_gpt.yaml.")],
) -> None:
    """Copy a recipe to edit it; then: stabletrain train ./my_gpt.yaml."""
    from stabletrain.config.compose import find_recipe

    if target.suffix not in (".yaml", ".yml"):
        raise UserError(f"cp: expected a file that ends in .yaml, got {target}; name the new recipe's file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(find_recipe(recipe).read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"cp: {target} exists already; name another file, or delete it") from None
    except OSError as error:
        raise UserError(f"cp: cannot write {target} ({error.strerror}); name another file") from None
    print(f"wrote {target}; now: stabletrain train {target}")


@app.command()
def replay(
    plugin: Annotated[str, typer.Argument(help="A plugin that is a rule, or a config option such as zscore.")],
    file: Annotated[Path, typer.Argument(help="CSV with the columns loss and grad_norm, one row per attempted step.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of the rule: key=value.")] = None,
) -> None:
    """Run a rule over a recorded series and print what it would have done."""
    from stabletrain.cli.replay import replay_file

    print(replay_file(plugin, file, arguments or []))


@app.command("new-plugin")
def new_plugin(
    name: Annotated[str, typer.Argument(help="verb_noun, such as clip_median.")],
    folder: Annotated[Path, typer.Option("--in", help="Where the new distribution's folder is made.")] = Path("."),
) -> None:
    """Make a complete distribution of a plugin, ready to install and to edit."""
    from stabletrain.testing.template import create

    print(create(name, folder))


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        from stabletrain.cli.messages import complain

        complain(error)
        sys.exit(2)


def _request(words: list[str] | None, multirun: bool, trust: list[str] | None) -> LaunchRequest:
    from stabletrain.launch.launcher import LaunchRequest

    given = list(words or [])
    named = given.pop(0) if given and "=" not in given[0] and not given[0].startswith("~") else None
    return LaunchRequest(recipe=named, overrides=tuple(given), multirun=multirun, trust=tuple(trust or ()))


def _say_valid(recipes: list[str]) -> None:
    for name in recipes:
        print(f"{name}: composes, and every argument fits")
