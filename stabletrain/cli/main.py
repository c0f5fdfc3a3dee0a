"""The command line. Every command imports its modules when it runs, so that ``--help`` and ``ls`` are fast."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from stabletrain.errors import UserError
from stabletrain.settings import speak_of_keys

if TYPE_CHECKING:
    from stabletrain.launch.launcher import Job, LaunchRequest


class _Commands(TyperGroup):
    """The commands, with the ends that all of them share."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; a mistake of the user is one message, and Ctrl-C one line."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            from stabletrain.cli.messages import print_error

            print_error(error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    name="stabletrain",
    help="Train recipes with plugins that handle loss spikes and bad steps, and log every run to MLflow.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from stabletrain.version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train recipes with plugins that handle loss spikes and bad steps, and log every run to MLflow."""


def _complete(context: typer.Context, incomplete: str) -> list[str]:
    from stabletrain.cli.completion import complete

    return complete(context.params.get("words") or [], incomplete)


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="Name or file of a recipe, then Hydra overrides: group=option, key=value, ~key.",
        autocompletion=_complete,
        show_default=False,
    ),
]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", metavar="PACKAGE", help="A package of your own from which the config may build objects."),
]
Multirun = Annotated[
    bool, typer.Option("-m", "--multirun", help="Run several jobs, one for each combination of values such as a=1,2.")
]


Jobs = Annotated[
    int,
    typer.Option("--jobs", "-j", metavar="N", min=1, help="Runs side by side; each gets its share of the CPU's cores."),
]


@app.command(short_help="Run a recipe: stabletrain train char_gpt plugins/clip=none")
def train(
    words: Words = None,
    multirun: Multirun = False,
    jobs: Jobs = 1,
    trust: Trust = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan of a dry run (dry_run=true) as JSON.")
    ] = False,
) -> None:
    """Run a recipe: stabletrain train char_gpt optimizer.lr=3e-3 plugins/clip=none."""
    from stabletrain.cli.starting import starting
    from stabletrain.cli.summary import PrintingReporter, exit_code, summarize
    from stabletrain.launch.streams import tolerate_broken_output

    tolerate_broken_output()
    with starting():
        from stabletrain.launch.launcher import plan_jobs, prepare, run

        if jobs > 1 and not multirun:
            raise UserError(f"train: --jobs {jobs} needs several runs; add -m and values such as seed=1,2, or drop it")
        request = _request(words, multirun, trust)
        prepared = prepare(request)
        if all(job.composed.config["dry_run"] for job in prepared):
            from stabletrain.cli.plan import print_plans

            print_plans(prepared, plan_jobs(prepared, request), as_json=as_json)
            return
        if as_json:
            raise UserError("train: --json prints the plan of a dry run; add dry_run=true, or remove it")
        finished = run(request, prepared, PrintingReporter(), at_once=min(jobs, len(prepared)))
    print(summarize(finished), flush=True)
    raise typer.Exit(exit_code(finished))


@app.command(short_help="Take part in a run on several nodes: stabletrain join RUN_FOLDER")
def join(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_FOLDER", help="The run's folder, as its node 0 has printed it.")
    ],
    wait: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", min=0, help="Wait for a run that is not started yet.")
    ] = 0.0,
    trust: Trust = None,
    paths_outside: Annotated[
        bool, typer.Option("--paths-outside", help="Let the run write outside of its folder, as its run.yaml says.")
    ] = False,
) -> None:
    """Start this machine's processes of a run that another machine has started with launch=torchrun launch.nodes=N
    launch.rdzv=HOST:PORT. The folder is on a file system that all machines share. Relative paths and your own packages
    are from the current folder: use the line that the other machine has printed.

    Ends with the run, with its exit code. After this machine was lost, the same command lets it take part again.
    """
    from stabletrain.cli.starting import starting
    from stabletrain.launch.streams import tolerate_broken_output

    tolerate_broken_output()
    with starting():
        from functools import partial

        from stabletrain.launch.join import join as take_part

        say = partial(print, flush=True)
        code = take_part(folder.absolute(), trust=trust or (), wait=wait, paths_outside=paths_outside, say=say)
    raise typer.Exit(code)


@app.command(short_help="Compose a recipe and build all that it names; train nothing.")
def validate(words: Words = None, multirun: Multirun = False, trust: Trust = None) -> None:
    """Compose a recipe, and build all that it names. Prints all mistakes at once; reads no data, trains nothing."""
    from stabletrain.cli.starting import starting

    with starting():
        from stabletrain.launch.launcher import check_jobs, prepare

        request = _request(words, multirun, trust)
        jobs = prepare(request)
        check_jobs(jobs, request)
        _print_valid(jobs)


@app.command(short_help="Say what a run will need, cost and do, without training: stabletrain plan char_gpt")
def plan(
    words: Words = None,
    multirun: Multirun = False,
    measure: Annotated[
        int | None,
        typer.Option("--measure", metavar="N", help="Train N steps, at least 5, for the time and MFU of the run."),
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", metavar="P", help="Of a device for an hour, with --measure: the cost.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    trust: Trust = None,
) -> None:
    """Say what a run will need, cost and do: parameters, tokens, operations, memory, learning rate, plugins.

    The same as stabletrain train ... dry_run=true: nothing is trained, written or downloaded. With memory=80GB it says
    whether the run fits. --measure 20 trains some steps in a temporary folder, and extrapolates their median.
    """
    from stabletrain.cli.starting import starting
    from stabletrain.launch.streams import tolerate_broken_output

    tolerate_broken_output()
    with starting():
        from stabletrain.cli.plan import print_plans
        from stabletrain.launch.launcher import plan_jobs, prepare
        from stabletrain.launch.measured_steps import MeasureOptions, check_measurable, with_measured_steps

        options = MeasureOptions(steps=measure, price=price)
        request = _request(words, multirun, trust)
        if any(word.replace(" ", "") == "dry_run=false" for word in request.overrides):
            raise UserError("plan: it trains nothing; remove dry_run=false, or use stabletrain train")
        prepared = prepare(replace(request, overrides=("dry_run=true", *request.overrides)))
        if measure is not None:
            check_measurable(prepared)
        plans = plan_jobs(prepared, request)
        if measure is not None:
            plans = with_measured_steps(prepared, request, plans, options)
        print_plans(prepared, plans, as_json=as_json)


@app.command(short_help="Look for the best values of some keys, with Optuna.")
def sweep(
    words: Words = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            "--over",
            metavar="KEY=VALUES",
            help="What varies: optimizer.lr=log(1e-4,1e-1), linear(0,0.3), int(1,8), log_int(8,512), or values A,B,C. "
            "Give it once for each key.",
        ),
    ] = None,
    minimise: Annotated[
        str | None, typer.Option("--minimise", "--minimize", metavar="METRIC", help="What should be low: val/loss")
    ] = None,
    maximise: Annotated[
        str | None, typer.Option("--maximise", "--maximize", metavar="METRIC", help="What should be high: val/accuracy")
    ] = None,
    trials: Annotated[int, typer.Option("--trials", metavar="N", help="Trials to run now.")] = 20,
    jobs: Jobs = 1,
    study: Annotated[str | None, typer.Option("--study", metavar="NAME", show_default="after recipe and keys")] = None,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="FILE", help="The studies.", show_default="optuna.db beside MLflow's file"),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune/--no-prune", help="Stop trials that are worse than the median at a validation.")
    ] = True,
    trust: Trust = None,
) -> None:
    """Look for the best values of some keys with Optuna: stabletrain sweep char_gpt --over optimizer.lr=log(1e-4,1e-1)
    --minimise val/loss.

    Each trial is a run of its own. The same command again goes on with its study. A trial that diverges counts as bad,
    one that fails does not count.
    """
    from stabletrain.cli.starting import starting
    from stabletrain.launch.streams import tolerate_broken_output

    tolerate_broken_output()
    with starting():
        from stabletrain.cli.sweep import goal_of, search

        code = search(
            replace(_request(words, False, trust), typed=("stabletrain", *sys.argv[1:])),
            over or [],
            goal_of(minimise, maximise),
            trials=trials,
            at_once=jobs,
            study=study,
            storage=storage,
            prune=prune,
        )
    raise typer.Exit(code)


@app.command("lr-range", short_help="Raise the learning rate until the loss rises, and print two rates to try.")
def lr_range(
    words: Words = None,
    start: Annotated[float, typer.Option("--from", metavar="RATE", help="Learning rate of the first step.")] = 1e-6,
    stop: Annotated[float, typer.Option("--to", metavar="RATE", help="Learning rate of the last step.")] = 1.0,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Steps between them, at least 20.")] = 200,
    both: Annotated[bool, typer.Option("--both", help="A second time without the default stack of plugins.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", show_default="lr_range.png in the run's folder")
    ] = None,
    trust: Trust = None,
) -> None:
    """Raise the learning rate of a recipe from step to step, and print two rates to try.

    The recipe's own clipping and skipping are on, so this is the rate that is stable with them; rollback is off. The
    test ends when the smoothed loss is four times its best.
    """
    from stabletrain.cli.starting import starting
    from stabletrain.launch.streams import tolerate_broken_output

    tolerate_broken_output()
    with starting():
        from stabletrain.cli.lr_range import run_range_test
        from stabletrain.launch.lr_range import RangeOptions

        options = RangeOptions(start=start, stop=stop, steps=steps, both=both)
        code = run_range_test(_request(words, False, trust), options, plot)
    raise typer.Exit(code)


@app.command(short_help="Look for common mistakes in a recipe's module and data before a run.")
def doctor(
    words: Words = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON, too.")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="CHECK", help="Leave out a check, such as frozen. Give it once for each."),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="N", help="After these no further step is made.")
    ] = 60.0,
    trust: Trust = None,
) -> None:
    """Look for common mistakes in a recipe's module and data before a run: stabletrain doctor char_gpt.

    The first batches are read, and copies of the module are trained on them for a few steps each: with the recipe's
    optimizer, gradient_clip_val and, in 20 steps, its warm-up, without its plugins, precision and strategy, on one
    device. Nothing is written or logged.

    Exit codes: 0 no finding, 4 at least one, 2 a mistake in the command or the recipe.
    """
    from stabletrain.cli.starting import starting
    from stabletrain.launch.streams import tolerate_broken_output

    tolerate_broken_output()
    with starting():
        from stabletrain.cli.doctor import examine

        code = examine(_request(words, False, trust), json_file, skip or [], seconds)
    raise typer.Exit(code)


@app.command("ls", short_help="List recipes, plugins, slots and groups, with defaults.")
def list_names(what: Annotated[str, typer.Argument(help="recipes, plugins, slots, groups or all")] = "all") -> None:
    """List recipes, plugins, slots and the other config groups, with their defaults."""
    from stabletrain.cli.listing import print_tables

    print_tables(what)


@app.command(short_help="Show a plugin, a slot, a group, or a composed recipe.")
def show(
    name: Annotated[str, typer.Argument(help="Name of a recipe, plugin, slot, group or option.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides of a recipe.")] = None,
) -> None:
    """Show a plugin's card, arguments and distribution, a slot's options, or a recipe's composed config."""
    from stabletrain.cli.listing import print_details

    print_details(name, overrides or [])


@app.command("cp", short_help="Copy a recipe to edit it.")
def copy(
    recipe: Annotated[str, typer.Argument(help="Name or file of the recipe.")],
    target: Annotated[Path, typer.Argument(help="The new file, such as my_gpt.yaml.")],
) -> None:
    """Copy a recipe to edit it, then run it: stabletrain train ./my_gpt.yaml."""
    from stabletrain.config.compose import find_recipe
    from stabletrain.config.yaml_file import read_text

    if target.suffix not in (".yaml", ".yml"):
        raise UserError(f"cp: expected a new file that ends in .yaml, got {target}")
    text = read_text(find_recipe(recipe))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"cp: {target} already exists; choose another file, or delete it") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cp: cannot write {str(target)!r} ({reason}); choose another file") from None
    print(f"wrote {target}; run it with: stabletrain train {target}")


@app.command(short_help="Print what plugins would have done at recorded steps.")
def replay(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[PLUGIN] SERIES [KEY=VALUE]...",
            help="A rule or one of its options, such as zscore; a CSV file, or a run's folder, id or name; arguments "
            "of the rule. With --stack: the series, and SLOT=OPTION.",
            show_default=False,
        ),
    ],
    stack: Annotated[
        bool, typer.Option("--stack", help="Replay the whole default stack, as the guard joins it.")
    ] = False,
    run: Annotated[
        str | None,
        typer.Option("--run", metavar="RUN", help="The run, in a file with several.", show_default=False),
    ] = None,
) -> None:
    """Print what a rule would have done at recorded steps.

    A series is a CSV file with the columns loss and grad_norm, of CSVLogger or your own, one row for each attempted
    step; or MLflow's export with the columns run, key, step and value; or a run: its folder, id, the beginning of an
    id, or its name. Of a run every step is read, if it has recorded them, and otherwise the sampled metrics.
    """
    from stabletrain.cli.replay import replay_file, replay_stack

    if stack:
        print(replay_stack(words[0], words[1:], run))
        return
    if len(words) < 2 or "=" in words[1]:
        raise UserError(
            f"replay: expected a rule and a series, got {' '.join(words)!r}; for the whole default stack add --stack"
        )
    print(replay_file(words[0], words[1], words[2:], run))


@app.command(short_help="Say what happened in a run, and what to try next: stabletrain report RUN")
def report(
    run: Annotated[
        str,
        typer.Argument(help="A run's folder, its id, the beginning of an id, or its name.", show_default=False),
    ],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with charts, too.")] = None,
) -> None:
    """Say what happened in a run: its numbers, each intervention with its reason, and findings with what to try next.

    Findings are hints and no diagnosis; docs/findings.md has the table of their thresholds and sources.
    """
    from stabletrain.cli.report import read_report

    found = read_report(run)
    print("\n".join(found.lines()))
    if html is not None:
        from stabletrain.cli.report_page import write_report

        write_report(html, found)
        print(f"\npage: {html}")


@app.command(short_help="Draw the loss around a run's weights: stabletrain landscape RUN")
def landscape(
    run: Annotated[
        str,
        typer.Argument(help="A run's folder, its id, the beginning of an id, or its name.", show_default=False),
    ],
    resolution: Annotated[
        int, typer.Option("--resolution", metavar="N", min=5, max=401, help="Points along each side of a plane.")
    ] = 25,
    batches: Annotated[
        int, typer.Option("--batches", metavar="N", min=1, help="Batches of the training loader that make the loss.")
    ] = 4,
    checkpoints: Annotated[
        int, typer.Option("--checkpoints", metavar="N", min=1, help="Checkpoints at most, evenly spaced.")
    ] = 20,
    batch_stats: Annotated[
        bool, typer.Option("--batch-stats", help="BatchNorm by the statistics of each batch, as in training.")
    ] = False,
    curvature: Annotated[
        bool, typer.Option("--curvature/--no-curvature", help="Eigenvalues of the Hessian at each checkpoint.")
    ] = True,
    surface: Annotated[bool, typer.Option("--surface", help="Draw the planes as surfaces, too.")] = False,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, max=2**31, help="Of the random plane's directions.")
    ] = 0,
    trust: Trust = None,
) -> None:
    """Draw the loss around a run's weights, from its checkpoints: pictures, a JSON file, and a table.

    A random plane through the last weights, filter-normalised; the plane in which the checkpoints differ most, with
    their path; the largest and the smallest eigenvalue of the Hessian at each checkpoint. What it costs is printed
    before it begins. The result is in landscape/ of the run's folder and of its artifacts in MLflow.

    It is of one process in 32 bits with dropout off, whatever the run was. Needs matplotlib for the pictures and scipy
    for the eigenvalues: pip install "stabletrain[landscape]".
    """
    from stabletrain.cli.starting import starting
    from stabletrain.launch.streams import tolerate_broken_output

    tolerate_broken_output()
    with starting():
        from stabletrain.cli.landscape import run as compute
        from stabletrain.landscape.study import Options

        options = Options(
            resolution=resolution, batches=batches, batch_stats=batch_stats, has_curvature=curvature, seed=seed
        )
        compute(run, options, most=checkpoints, surface=surface, trust=trust or ())


@app.command(short_help="Compare runs: what differs, how they ended, and a page with charts (--html FILE).")
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Id, beginning of an id, name or folder of a run; a sweep's run stands for its jobs.",
            show_default=False,
        ),
    ] = None,
    experiment: Annotated[str | None, typer.Option(metavar="NAME", help="All runs of an experiment.")] = None,
    query: Annotated[
        str, typer.Option("--filter", metavar="FILTER", help='Of these, such as "metrics.`val/loss` < 2".')
    ] = "",
    seeds: Annotated[
        bool, typer.Option("--seeds", help="Mean and standard deviation of runs that differ in the seed alone.")
    ] = False,
    equal: Annotated[bool, typer.Option("--equal", help="List the parameters that are equal, too.")] = False,
    metrics: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Further metrics, such as 'stability/*'.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with tables and charts.")] = None,
    limit: Annotated[int, typer.Option(help="The maximum number of runs of an experiment, the newest.")] = 50,
) -> None:
    """Compare recorded runs: the parameters that differ, how stable they were, how they ended.

    The store is MLFLOW_TRACKING_URI, or mlflow.db in the current folder. Runs of other tools have what they logged.
    """
    from stabletrain.cli.comparing import run_comparison

    run_comparison(
        runs or [],
        experiment=experiment,
        query=query,
        seeds=seeds,
        equal=equal,
        metrics=metrics or [],
        html=html,
        limit=limit,
    )


@app.command(
    short_help="Run a recorded run again, and check whether every step is the same: stabletrain reproduce RUN --check"
)
def reproduce(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN [KEY=VALUE]...",
            help="The run: its id, the beginning of an id, its name, or its folder; then values of its config to "
            "change.",
            show_default=False,
        ),
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Run without tracking, and compare the bits of every attempted step.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            metavar="N",
            help="End after N attempted steps; schedules and max_steps stay.",
            show_default=False,
        ),
    ] = None,
    trust: Trust = None,
) -> None:
    """Run a recorded run again from its run.yaml, in a new folder; its config is not trusted.

    Without --check it is a new run in MLflow, with the tag reproduces. With --check nothing is logged, and the loss,
    the gradient norm and the end of every attempted step are compared with the original's, bit for bit; then comes
    what differs between the two, the most likely cause first. Nothing is installed or checked out: the commands that
    would are printed.

    Exit codes: 0 every compared step is bit-identical (without --check: the run has finished), 1 a step differs, is
    missing or unknown, 2 a mistake in the command or the run's config.
    """
    from stabletrain.cli.starting import starting
    from stabletrain.launch.streams import tolerate_broken_output

    tolerate_broken_output()
    with starting():
        from stabletrain.cli.reproduce import run

        code = run(words[0], check=check, steps=steps, changes=words[1:], trust=trust or ())
    raise typer.Exit(code)


@app.command(short_help="Write the weights of a checkpoint to one file, for torch.load.")
def consolidate(
    run: Annotated[
        Path,
        typer.Argument(help="A run's folder, for its newest good checkpoint, or one checkpoint (.../step-00000100)."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The new file.", show_default="beside the checkpoint")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="The whole checkpoint, for load_from_checkpoint and ckpt_path.")
    ] = False,
) -> None:
    """Write the weights of a checkpoint to one file, however many processes have written it.

    The file is for module.load_state_dict(torch.load(FILE, weights_only=True)).
    """
    from stabletrain.runtime.checkpoints.consolidating import consolidate as write

    found = write(run, output, everything)
    print(f"wrote {found.file}: step {found.step} of {found.checkpoint}")


@app.command(short_help="Show the runs in MLflow's web interface.")
def ui(
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Of the server; if it is in use, the next free one.")
    ] = 5000,
    host: Annotated[
        str, typer.Option("--host", help="Name or address of this machine; 0.0.0.0: other machines may connect, too.")
    ] = "127.0.0.1",
    uri: Annotated[
        str | None,
        typer.Option(
            "--uri", help="The tracking store.", show_default="MLFLOW_TRACKING_URI, or mlflow.db in the current folder"
        ),
    ] = None,
) -> None:
    """Start MLflow's server for the runs of a store, print its address once it answers, and end it with Ctrl-C."""
    from stabletrain.cli.starting import starting

    with starting():
        from stabletrain.cli.ui import serve

        serve(uri, host, port)


@app.command(short_help="Send a run to the tracking store that did not respond before.")
def upload(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    uri: Annotated[
        str | None,
        typer.Option(
            "--uri", help="The tracking store.", show_default="MLFLOW_TRACKING_URI, or mlflow.db in the current folder"
        ),
    ] = None,
) -> None:
    """Send to the tracking store what it did not accept of a run: the whole run, or metrics, artifacts and status."""
    from stabletrain.cli.starting import starting

    with starting():
        from stabletrain.launch.uploading import upload as send

        print(send(run, uri))


@app.command("new-plugin", short_help="Make a distribution with a complete plugin, to edit.")
def new_plugin(
    name: Annotated[str, typer.Argument(help="verb_noun, such as clip_median.")],
    folder: Annotated[Path, typer.Option("--in", help="Folder in which to make the new distribution.")] = Path("."),
) -> None:
    """Make a distribution with a complete plugin, to install and edit."""
    from stabletrain.testing.template import create

    print(create(name, folder))


@speak_of_keys()
def main() -> None:
    """Run the command line; exit with its code.

    A `UserError` becomes one message and exit code 2, Ctrl-C one line and 130. Output that cannot be written ends the
    command with 1, without a traceback: ``stabletrain ls | head -1``.
    """
    if sys.stdout is None:  # closed by the shell: ``>&-``
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        if _output_fails():
            sys.exit(end.code or 1)
        raise
    except OSError:
        if not _output_fails(probe="\n"):
            raise
        sys.exit(1)


def _output_fails(probe: str = "") -> bool:
    """Return whether standard output cannot be written; say so, unless its reader has just gone away."""
    try:
        sys.stdout.write(probe)
        sys.stdout.flush()
    except OSError as error:
        # what is still buffered is discarded, or the interpreter would fail once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: cannot write the output ({error.strerror})", file=sys.stderr)
        return True
    return False


def _request(words: list[str] | None, multirun: bool, trust: list[str] | None) -> LaunchRequest:
    from stabletrain.launch.launcher import LaunchRequest

    overrides = list(words or [])
    recipe = overrides.pop(0) if overrides and "=" not in overrides[0] and not overrides[0].startswith("~") else None
    return LaunchRequest(recipe=recipe, overrides=tuple(overrides), multirun=multirun, trust=tuple(trust or ()))


def _print_valid(jobs: list[Job]) -> None:
    from stabletrain.cli.messages import valid

    for job in jobs:
        print(valid(job.composed.recipe))
