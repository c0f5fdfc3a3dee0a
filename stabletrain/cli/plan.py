"""The output of a dry run and of ``plan``: the plan of one run in full, of several in one table, or all as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from stabletrain.cli import plan_numbers as numbers
from stabletrain.cli.messages import valid
from stabletrain.core.bytes import shown
from stabletrain.planning.plan import PerRank, Plan, Verdict, as_json

if TYPE_CHECKING:
    from stabletrain.launch.launcher import Job

_NOT_COUNTED = (
    "Not counted in the memory: what a GPU needs besides tensors (CUDA's context, the allocator's rounding, workspaces "
    "of kernels, buffers of NCCL), validation, and temporary tensors and messages of plugins."
)
_MEMORY = (
    ("parameters", "parameters"),
    ("buffers", "buffers"),
    ("gradients", "gradients"),
    ("optimizer_state", "optimizer state"),
    ("buckets", "buckets of gradients"),
    ("window_gradients", "gradients held in a window"),
    ("largest_group", "largest gathered group"),
    ("activations", "activations of a micro-batch"),
    ("batch", "a micro-batch"),
)
"""Fields of `PerRank` in the order of the table, and what they are called there."""


def print_plans(jobs: Sequence[Job], plans: Sequence[tuple[Plan | None, str | None]], *, as_json: bool) -> None:
    """Print the plans of a dry run.

    Args:
        jobs: all without a mistake.
        plans: for each of them the plan, or None and why there is none.
        as_json: print JSON instead of tables.
    """
    if as_json:
        print(json.dumps(_content(jobs, plans), indent=2, ensure_ascii=False))
        return
    for job in jobs:
        print(valid(job.composed.recipe))
    if len(jobs) > 1:
        _print_several(jobs, plans)
        return
    for plan, why in plans:
        if plan is None:
            print(f"it cannot be planned, since the module cannot be set up without memory: {why}")
        else:
            _print_one(plan)


def _content(jobs: Sequence[Job], plans: Sequence[tuple[Plan | None, str | None]]) -> dict[str, object]:
    return {
        "jobs": [
            {
                "recipe": job.composed.recipe,
                "overrides": list(job.composed.overrides),
                "plan": None if plan is None else as_json(plan),
                "no_plan_since": why,
            }
            for job, (plan, why) in zip(jobs, plans, strict=True)
        ]
    }


def _print_one(plan: Plan) -> None:
    print()
    for line in _head(plan):
        _print_text(line)
    if plan.per_rank.largest_group:
        rows = [
            (f"{each.name} ... {each.last}" if each.last else each.name or "(the rest)", f"{each.count} x {each.kind}",
             numbers.count(each.parameters), shown(each.whole_bytes), shown(each.rank_bytes))
            for each in sorted(plan.groups, key=lambda each: not each.name)
        ]  # fmt: skip
        _print_table(("gathered together", "", "parameters", "whole", "on a rank"), rows, numbers=(2, 3, 4))
    _print_table(("memory of a rank", ""), list(_memory(plan.per_rank)), numbers=(1,))
    if plan.per_rank.peak_at is not None:
        print(f"the peak is in: {plan.per_rank.peak_at}")
    messages = [(each.kind, str(each.count), shown(each.bytes)) for each in plan.collectives]
    if plan.processes * plan.nodes > 1:
        how = "" if plan.source == "traced" else ", by formula"
        _print_table((f"messages in a step{how}", "count", "whole tensors"), messages, numbers=(1, 2))
    if counted := list(numbers.operations(plan)):
        _print_table(("operations of a step", ""), counted, numbers=(1,))
    if lines := list(numbers.learning_rate(plan)):
        print("", *lines, sep="\n")
    said = [(each.key, _said(each.text, each.host_bytes, each.device_bytes)) for each in plan.plugins]
    _print_table(("what they will do", ""), said)
    if plan.measured is not None:
        _print_table(("measured", ""), list(numbers.timing(plan, plan.measured)))
    print()
    for line in _end(plan):
        _print_text(line)


def _head(plan: Plan) -> Iterator[str]:
    processes = plan.processes * plan.nodes
    nodes = f" on {plan.nodes} nodes" if plan.nodes > 1 else ""
    size = f"{processes} processes{nodes}" if processes > 1 else "1 process"
    yield f"{size}, {plan.strategy}, {plan.precision}, {plan.optimizer}"
    yield numbers.parameters(plan)
    yield numbers.steps(plan)
    if (about := numbers.tokens(plan)) is not None:
        yield about
    if plan.stopped_by is not None:
        yield f"no step could be traced, so activations and the peak are unknown. {plan.stopped_by}"


def _memory(rank: PerRank) -> Iterator[tuple[str, str]]:
    optional = ("buffers", "buckets", "window_gradients", "largest_group")
    for name, label in _MEMORY:
        value = getattr(rank, name)
        if value or name not in optional:
            yield label, "unknown" if value is None else shown(value)
    yield "peak", "unknown" if rank.peak is None else shown(rank.peak)
    for part, size in sorted(rank.peak_parts.items(), key=lambda each: -each[1]):
        yield f"  {part}", shown(size)


def _end(plan: Plan) -> Iterator[str]:
    size = "unknown" if plan.checkpoint_bytes is None else shown(plan.checkpoint_bytes)
    yield f"A checkpoint of all ranks together: {size}."
    yield from (f"{note[0].upper()}{note[1:]}." for note in plan.notes)
    yield from numbers.about_operations(plan)
    if plan.measured is not None:
        yield numbers.ABOUT_TIME
    yield _NOT_COUNTED
    if plan.verdict is not None:
        yield from _verdict(plan.verdict)


def _verdict(verdict: Verdict) -> Iterator[str]:
    memory, needed = shown(verdict.memory), shown(verdict.needed)
    if verdict.fits:
        yield f"It fits into {memory}: {needed} are needed, {shown(verdict.memory - verdict.needed)} are left."
    elif verdict.fits is None:
        yield f"Whether it fits into {memory} is unknown: {needed} are needed without activations."
    else:
        yield f"It does not fit into {memory}: {needed} are needed, {shown(verdict.needed - verdict.memory)} too much."
        for each in verdict.options:
            fits = "fits" if each.peak <= verdict.memory else "does not fit"
            yield f"  with {each.override}: {shown(each.peak)}, {fits}"


def _print_several(jobs: Sequence[Job], plans: Sequence[tuple[Plan | None, str | None]]) -> None:
    rows = []
    for job, (plan, why) in zip(jobs, plans, strict=True):
        name = job.name or job.composed.recipe
        if plan is None:
            rows.append((str(job.number), name, "", "", "", f"no plan: {why}"))
            continue
        rank, verdict = plan.per_rank, plan.verdict
        state = (rank.parameters, rank.gradients, rank.optimizer_state)
        held = "unknown" if None in state else shown(sum(each or 0 for each in state))
        fits = {True: "fits", False: "does not fit", None: "unknown"}[verdict.fits] if verdict is not None else ""
        sent = shown(sum(each.bytes for each in plan.collectives))
        rows.append((str(job.number), name, held, "unknown" if rank.peak is None else shown(rank.peak), sent, fits))
    head = ("job", "", "state of a rank", "peak", "messages in a step", "")
    _print_table(head, rows, numbers=(2, 3, 4))
    print()
    _print_text(_NOT_COUNTED)


def _said(text: str, host: int | None, device: int | None) -> str:
    memory = [f"{shown(size)} of {what}" for size, what in ((host, "main memory"), (device, "the device")) if size]
    return f"{text} ({' and '.join(memory)})" if memory else text


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(head):
        justify = "right" if index in numbers else "left"
        table.add_column(column, justify=justify, no_wrap=index in numbers, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*row)
    print()
    Console(markup=False, highlight=False).print(table)


def _print_text(text: str) -> None:
    from rich.console import Console

    Console(markup=False, highlight=False, soft_wrap=False).print(text)
