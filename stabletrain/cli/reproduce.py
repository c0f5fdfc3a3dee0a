"""What ``stabletrain reproduce`` prints, and its exit code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stabletrain.cli.summary import exit_code, summarize
from stabletrain.launch.original import Restore
from stabletrain.launch.recorded_run import RecordedRun
from stabletrain.launch.reproduce import Checked, Part, Repeat, ReproduceReporter, reproduce
from stabletrain.tracking.same_run import describe

_MOST = 10
"""Lines of one list that are shown."""
_NEVER_RECORDED = (
    "nothing that was recorded differs; never recorded are: the kernels that autotuning has chosen "
    "(cudnn_benchmark, torch.compile), and the order of operations in non-deterministic operators"
)


class _Printing(ReproduceReporter):
    def __init__(self) -> None:
        self._restored: set[str] = set()

    def begins(self, run: RecordedRun, parts: Sequence[Part]) -> None:
        """Print which run is repeated, and in how many parts."""
        name = f"{run.name} ({run.run_id})" if run.run_id else run.name
        count = f", which was resumed: {len(parts)} parts" if len(parts) > 1 else ""
        print(f"reproduce {name}{count}", flush=True)
        if parts[0].resume:
            print(f"  from the checkpoint {parts[0].resume}, as the run itself", flush=True)

    def starting(self, config: dict[str, Any], number: int | None) -> None:
        """Print the recipe, the seed and the folder."""
        print(f"{config['recipe']}, seed {config['seed']}, in {config['run_dir']}", flush=True)

    def restore(self, commands: Sequence[Restore]) -> None:
        """Print the commands that would restore packages and code; they are not run."""
        for each in commands:
            if each.reason not in self._restored:
                print(f"  {each.reason}; to have the original's:\n    {each.command}", flush=True)
                self._restored.add(each.reason)

    def ended(self, repeat: Repeat, number: int, count: int) -> None:
        """Print the result of a part."""
        if repeat.checked is not None:
            part = f"part {number} of {count}: " if count > 1 else ""
            print("\n".join(["", *_lines(repeat.checked, part), f"folder: {repeat.job.config['run_dir']}"]), flush=True)


def run(wanted: str, *, check: bool, steps: int | None, changes: Sequence[str], trust: Sequence[str]) -> int:
    """Reproduce a run, print what was found, and return the exit code.

    Args:
        wanted: id, prefix of an id, name or folder of the run.
        check: whether to compare every step.
        steps: attempted steps after which it is ended; None: all.
        changes: ``KEY=VALUE`` to change in its config.
        trust: packages from which its config may build objects.

    Returns:
        With a check 0 if every compared step is bit-identical, else 1. Without one that of ``stabletrain train``.
    """
    done = reproduce(wanted, _Printing(), check=check, steps=steps, changes=changes, trust=trust)
    interrupted = [
        each.job for each in done if each.job.result and each.job.result.end in ("interrupted", "terminated")
    ]
    if not check:
        print(summarize([each.job for each in done], suggest=False), flush=True)
        return exit_code([each.job for each in done])
    same = all(each.checked is not None and each.checked.same.verdict == "identical" for each in done)
    complete = not done[-1].part.has_next
    if same and complete:
        return 0
    if interrupted:
        return exit_code(interrupted)
    return 1


def _lines(checked: Checked, part: str) -> Iterator[str]:
    first, *others = describe(checked.same)
    yield f"{part}{first}"
    yield from (f"  {line}" for line in others)
    same, found = checked.same, checked.differences
    if same.verdict in ("unknown", "incomplete"):
        yield f"  the repeat has ended: {checked.end}"
    is_same = same.verdict == "identical"
    if found.likely:
        yield "differs, without effect on these steps:" if is_same else "what differs, the most likely cause first:"
        yield from _listed([str(each) for each in found.likely])
    elif same.first is not None:
        yield _NEVER_RECORDED
    if same.first is not None and checked.undetermined:
        yield f"  torch names as non-deterministic: {', '.join(checked.undetermined)}"
    if found.unknown and not is_same:
        yield "unknown, since one of the two has not recorded it:"
        yield from _listed(found.unknown)
    if found.harmless:
        yield "differs, and no result depends on it:"
        yield from _listed([str(each) for each in found.harmless])


def _listed(lines: Sequence[str]) -> Iterator[str]:
    yield from (f"  {line}" for line in lines[:_MOST])
    if len(lines) > _MOST:
        yield f"  and {len(lines) - _MOST} more"
