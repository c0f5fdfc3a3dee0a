"""Are the steps of two runs the same? Pure functions on the records of their attempted steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from stabletrain.runtime.records.steps_file import Flag, Steps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TOLERANCE = 1e-5
"""Largest relative difference of losses that is promised for other hardware, for the first steps."""

Verdict = Literal["identical", "close", "differs", "incomplete", "unknown"]


class Step(NamedTuple):
    """What is recorded of one attempted step; see `stabletrain.runtime.records.steps_file.Steps`."""

    loss: float
    grad_norm: float
    flags: int


@dataclass(frozen=True, kw_only=True)
class SameSteps:
    """How far the steps of a repeat are those of the original.

    Args:
        compared: number of steps that both have recorded.
        first: the first step whose bits differ; None if there is none.
        parts: what differs at that step: some of ``loss``, ``grad_norm`` and ``flags``.
        then: the original's values at that step.
        now: the repeat's.
        beyond: the first step with losses further apart than `TOLERANCE`, or with other flags; None if there is none.
        largest: largest relative difference of the losses; inf where only one is finite.
        missing: number of steps that the original has recorded and the repeat has not made.
        unrecorded: number of steps of the repeat, between those of the original, of which the original has no record.
        extra: number of steps of the repeat after the last one of the original.
        losses_only: whether no gradient norm was recorded, as in a run without plugins.
    """

    compared: int
    first: int | None = None
    parts: tuple[str, ...] = ()
    then: Step | None = None
    now: Step | None = None
    beyond: int | None = None
    largest: float = 0.0
    missing: int = 0
    unrecorded: int = 0
    extra: int = 0
    losses_only: bool = False

    @property
    def verdict(self) -> Verdict:
        """``identical``: every compared bit; ``close``: the first steps within `TOLERANCE`; ``differs``: not even they.

        ``incomplete``: what was compared is identical, but one of the two has made more steps. ``unknown``: nothing
        could be compared.
        """
        if not self.compared:
            return "unknown"
        if self.first is None:
            return "incomplete" if self.missing or self.extra else "identical"
        return "differs" if self.beyond == self.first else "close"

    @property
    def where(self) -> str:
        """What the first difference points to; empty if there is none."""
        if "loss" in self.parts:
            return "the loss differs first: data, weights or the forward pass"
        if "grad_norm" in self.parts:
            return "the gradient norm differs first, at an equal loss: the backward pass"
        return "flags differ first, at equal values: a decision of a plugin" if self.parts else ""


def compare_steps(then: Steps, now: Steps, *, begin: int = 0, end: int | None = None) -> SameSteps:
    """Compare the steps that two runs have recorded, bit for bit; all NaN are equal.

    Args:
        then: of the original.
        now: of the repeat.
        begin: the first step to compare.
        end: the step after the last one to compare; None: all of the original, and what the repeat has made beyond.
    """
    import numpy as np

    then, now = _between(then, begin, end), _between(now, begin, end)
    common, i, j = np.intersect1d(then.step, now.step, assume_unique=True, return_indices=True)
    missing = len(then.step) - len(common)
    last = int(then.step[-1]) if len(then.step) else begin - 1
    extra = int((now.step > last).sum())
    equal = SameSteps(
        compared=len(common),
        missing=missing,
        extra=extra,
        unrecorded=len(now.step) - len(common) - extra,
        losses_only=bool(np.isnan(then.grad_norm[i]).all() and np.isnan(now.grad_norm[j]).all()),
    )
    if not len(common):
        return equal
    losses, norms = (then.loss[i], now.loss[j]), (then.grad_norm[i], now.grad_norm[j])
    flags = (then.flags[i], now.flags[j])
    differing = {"loss": _bits_differ(*losses), "grad_norm": _bits_differ(*norms), "flags": flags[0] != flags[1]}
    relative = _relative(*losses)
    first = _first(np.logical_or.reduce(list(differing.values())))
    beyond = _first((relative > TOLERANCE) | differing["flags"])
    if first is None:
        return equal
    return replace(
        equal,
        first=int(common[first]),
        parts=tuple(name for name, where in differing.items() if where[first]),
        then=Step(float(losses[0][first]), float(norms[0][first]), int(flags[0][first])),
        now=Step(float(losses[1][first]), float(norms[1][first]), int(flags[1][first])),
        beyond=None if beyond is None else int(common[beyond]),
        largest=float(relative.max()),
    )


def describe(found: SameSteps) -> list[str]:
    """Return what was found as lines of text, the verdict first.

    >>> describe(SameSteps(compared=60))
    ['bit-identical over 60 steps']
    """
    lines = [_verdict(found)]
    if found.first is not None and found.then is not None and found.now is not None:
        if found.beyond != found.first:
            lines.append(f"the first different bits are at step {found.first}")
        lines.append(found.where)
        lines += [
            f"{name} at step {found.first}: {_value(name, found.then)} -> {_value(name, found.now)}"
            for name in found.parts
        ]
        lines.append(f"largest relative difference of the loss: {found.largest:.1e}")
    if found.missing:
        lines.append(f"{_steps(found.missing)} of the original that the repeat has not made")
    if found.extra:
        lines.append(f"{_steps(found.extra)} of the repeat after the last one that the original has recorded")
    if found.unrecorded:
        lines.append(f"{_steps(found.unrecorded)} of which the original has no record: unknown")
    return lines


def _verdict(found: SameSteps) -> str:
    if found.verdict == "unknown":
        return "unknown: no step is recorded in both runs"
    if found.verdict in ("identical", "incomplete"):
        also = "" if found.verdict == "identical" else ", but one of the two has made more steps"
        only = " (losses only: no gradient norm was recorded)" if found.losses_only else ""
        return f"bit-identical over {_steps(found.compared)}{only}{also}"
    if found.beyond is None:
        return f"within {TOLERANCE:.0e} over {_steps(found.compared)}, not bit-identical".replace("e-05", "e-5")
    if found.verdict == "close":
        return f"within {TOLERANCE:.0e} up to step {found.beyond - 1}, then not".replace("e-05", "e-5")
    return f"differs from step {found.first} on"


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def _value(name: str, step: Step) -> str:
    if name != "flags":
        value = step.loss if name == "loss" else step.grad_norm
        return f"{value!r}" if math.isfinite(value) else str(value)
    names = [each.name.lower() for each in Flag if each.name and each & step.flags and each is not Flag.RECORDED]
    return " and ".join(names).replace("_", " ") or "applied as it is"


def _between(steps: Steps, begin: int, end: int | None) -> Steps:
    wanted = steps.step >= begin
    if end is not None:
        wanted &= steps.step < end
    return Steps(steps.step[wanted], steps.loss[wanted], steps.grad_norm[wanted], steps.flags[wanted])


def _bits_differ(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.bool_]:
    import numpy as np

    found: NDArray[np.bool_] = (a.view(np.int64) != b.view(np.int64)) & ~(np.isnan(a) & np.isnan(b))
    return found


def _relative(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The relative difference; 0 for equal values, NaN among them, and inf where only one is finite."""
    import numpy as np

    with np.errstate(all="ignore"):
        found = np.abs(a - b) / np.maximum(np.abs(a), np.abs(b))
    found[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
    found[np.isnan(found)] = np.inf
    result: NDArray[np.float64] = found
    return result


def _first(where: NDArray[np.bool_]) -> int | None:
    return int(where.argmax()) if where.any() else None
