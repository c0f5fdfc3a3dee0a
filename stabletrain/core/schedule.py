"""The arguments of a learning-rate schedule, and the curve that they describe. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from stabletrain.core import curves
from stabletrain.core.curves import Curve, TailShape
from stabletrain.core.lengths import Length, LengthLike, RunLength
from stabletrain.errors import UserError, require
from stabletrain.settings import worded

Kind = Literal[
    "constant",
    "linear",
    "cosine",
    "cosine_restarts",
    "wsd",
    "inverse_sqrt",
    "exponential",
    "step",
    "polynomial",
    "cyclical",
    "one_cycle",
    "power",
]

USED_BY: dict[str, tuple[Kind, ...]] = {
    "min_factor": tuple(kind for kind in get_args(Kind) if kind != "constant"),
    "decay": ("wsd", "power"),
    "tail": ("wsd", "power"),
    "cycles": ("cosine_restarts", "cyclical"),
    "cycle_growth": ("cosine_restarts",),
    "timescale": ("inverse_sqrt", "power"),
    "exponent": ("power",),
    "gamma": ("exponential", "step"),
    "gamma_every": ("exponential",),
    "milestones": ("step",),
    "power": ("polynomial",),
    "start_factor": ("one_cycle",),
    "warmup_from_zero": tuple(kind for kind in get_args(Kind) if kind != "one_cycle"),
}
"""The kinds that use an argument; arguments that are not listed are used by all kinds."""

_ENDLESS = 10**15


@dataclass(frozen=True, eq=False)
class Schedule:
    """Set the learning rate before every step: base rate x curve(applied steps).

    The base rate of a parameter group is the one that the optimizer was created with. The rate depends on the number of
    applied steps only, so it is correct after a resume or a rollback, and a skipped step does not advance it. The
    module's own scheduler is replaced for the run, and rates that anything else sets are overwritten, with a warning.
    Lengths are applied steps (``500``), epochs (``"3ep"``), tokens (``"1e9tok"``) or a share of ``total`` (``"2%"``).

    Args:
        kind: shape of the curve.
        lr_warmup: length of the linear rise, from 1/lr_warmup of the base rate at the first step; 0 is none. For
            one_cycle the length of its cosine-shaped rise.
        total: length of the whole curve, including the warm-up; None is that of the run, from max_steps, or max_epochs
            and the training data.
        min_factor: final share of the base rate, 0 to 1; for kinds without an end the lower bound.
        decay: length of the tail of wsd and power.
        tail: shape of that tail.
        cycles: number of cycles of cosine_restarts and cyclical, >= 1.
        cycle_growth: length of a cycle of cosine_restarts relative to the one before, > 0.
        timescale: of inverse_sqrt and power: steps over which the rate stays near the base; None is lr_warmup.
        exponent: of power, <= 0.
        gamma: factor of exponential and step, above 0, at most 1.
        gamma_every: length over which exponential falls by gamma.
        milestones: when step falls by gamma, from the start of the run, ascending.
        power: of polynomial, > 0.
        start_factor: first share of the base rate of one_cycle, above 0, at most 1.
        warmup_from_zero: begin the warm-up at 0, as transformers and OLMo do; the first batch then changes nothing.
        tokens_per_step: tokens in one optimizer step over all ranks; needed for lengths in tokens only.

    Raises:
        UserError: if an argument is out of range or has no effect with the kind; when training starts, if the lengths
            are longer than the run.

    References: module docstring of `stabletrain.core.curves`.
    """

    kind: Kind = "constant"
    lr_warmup: LengthLike = "2%"
    total: LengthLike | None = None
    min_factor: float = 0.0
    decay: LengthLike = "20%"
    tail: TailShape = "1-sqrt"
    cycles: int = 4
    cycle_growth: float = 1.0
    timescale: LengthLike | None = None
    exponent: float = -0.51
    gamma: float = 0.1
    gamma_every: LengthLike = "50%"
    milestones: Sequence[LengthLike] = ("50%", "75%")
    power: float = 2.0
    start_factor: float = 0.04
    warmup_from_zero: bool = False
    tokens_per_step: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for argument, allowed in (("kind", Kind), ("tail", TailShape)):
            known = get_args(allowed)
            self._require(getattr(self, argument) in known, argument, f"one of {', '.join(known)}")
        for field in fields(Schedule):
            argument, kinds = field.name, USED_BY.get(field.name, get_args(Kind))
            if self.kind not in kinds and getattr(self, argument) != field.default:
                raise UserError(
                    worded(
                        f"schedule: {argument}={getattr(self, argument)!r} has no effect with kind={self.kind!r}; "
                        f"it belongs to {', '.join(kinds)} (config key schedule.{argument})"
                    )
                )
        self._check_early()

    def _check_early(self) -> None:
        """Check everything that does not depend on the run, before the data is loaded."""
        names = ("lr_warmup", "total", "decay", "timescale", "gamma_every")
        given = [(name, getattr(self, name)) for name in names] + [("milestones", each) for each in self.milestones]
        given = [(name, value) for name, value in given if value is not None or name == "milestones"]
        lengths = [(name, Length.parse(value, name=f"schedule.{name}")) for name, value in given]
        for name, length in lengths:
            needed = name in ("total", "gamma_every", "milestones")
            self._require(length.value > 0 or not needed, name, "above 0")
        tokens = self.tokens_per_step
        self._require(tokens is None or 0 < tokens < math.inf, "tokens_per_step", "above 0 and finite, or None")
        units = {length.unit for _, length in lengths}
        milestones = [length for name, length in lengths if name == "milestones"]
        if len({length.unit for length in milestones}) == 1:  # else only the run decides which comes first
            values = [length.value for length in milestones]
            self._require(values == sorted(values), "milestones", "ascending")
        if self.kind == "step":
            curves.MultiStep((), self.gamma, self.min_factor)
        elif self.total is None or len(units - {"percent"}) <= 1:  # else only the run decides which is longer
            self.curve(RunLength(total_steps=_ENDLESS, steps_per_epoch=10**6, tokens_per_step=self.tokens_per_step))

    def check_run(self, total_steps: int) -> None:
        """Check the lengths in steps and percent against the length of a run, before the data is loaded.

        Args:
            total_steps: applied optimizer steps, >= 1.

        Raises:
            UserError: if the lengths are longer than the run.
        """
        names = ("lr_warmup", "total", "decay", "timescale", "gamma_every")
        given = [*(getattr(self, name) for name in names), *self.milestones]
        if {Length.parse(value).unit for value in given if value is not None} <= {"steps", "percent"}:
            self.curve(RunLength(total_steps=total_steps))

    def curve(self, run: RunLength) -> Curve:
        """The curve for a run of known length.

        Args:
            run: the known lengths of the run.

        Raises:
            UserError: if a length needs an unknown quantity, or the lengths together are longer than the run.

        >>> curve = Schedule("cosine", lr_warmup=4).curve(RunLength(total_steps=12))
        >>> [round(curve.factor(step), 3) for step in (0, 3, 4, 8, 12)]
        [0.25, 1.0, 1.0, 0.5, 0.0]
        """
        run = self.horizon(run)
        warmup = self.steps("lr_warmup", run)
        fits = run.total_steps is None or warmup <= run.total_steps
        self._require(fits, "lr_warmup", f"no longer than {_whole(run)}")
        return self._shape(run, warmup)

    def _shape(self, run: RunLength, warmup: int) -> Curve:
        low = self.min_factor

        def warm_up(body: Curve) -> Curve:
            return curves.Warmup(warmup, body, self.warmup_from_zero)

        if self.kind == "constant":
            return warm_up(curves.Constant())
        if self.kind == "exponential":
            return warm_up(curves.Exponential(self.gamma, self.steps("gamma_every", run), low))
        if self.kind == "step":
            milestones = [Length.parse(each).resolve(run, name="schedule.milestones") for each in self.milestones]
            fit = milestones == sorted(milestones) and min(milestones, default=warmup) >= warmup
            self._require(fit, "milestones", f"ascending and after the warm-up of {warmup} steps")
            return warm_up(curves.MultiStep(tuple(milestone - warmup for milestone in milestones), self.gamma, low))
        if self.kind == "inverse_sqrt":
            return warm_up(curves.Power(self._timescale(run, warmup), -0.5, low))

        if run.total_steps is None:
            raise UserError(
                f"schedule: kind={self.kind!r} needs the length of the run, which is unknown: set "
                "trainer.max_steps or trainer.max_epochs, or give schedule.total in steps"
            )
        if self.kind == "one_cycle":
            return curves.OneCycle(run.total_steps, warmup, self.start_factor, low)
        rest = max(run.total_steps - warmup, 1)
        if self.kind == "linear" or self.kind == "cosine":
            return warm_up(curves.Tail(curves.Constant(), rest, rest, self.kind, low))
        if self.kind == "wsd":
            return warm_up(curves.Tail(curves.Constant(), rest, self._decay(run, rest), self.tail, low))
        if self.kind == "power":
            body = curves.Power(self._timescale(run, warmup), self.exponent, 0.0)
            return warm_up(curves.Tail(body, rest, self._decay(run, rest), self.tail, low))
        if self.kind == "polynomial":
            return warm_up(curves.Polynomial(rest, self.power, low))
        if self.kind == "cyclical":
            return warm_up(curves.Triangular(rest, self.cycles, low))
        return warm_up(curves.CosineRestarts(rest, self.cycles, self.cycle_growth, low))

    def horizon(self, run: RunLength) -> RunLength:
        """The length of the run, with its `total_steps` replaced by `total` if that is given."""
        return run if self.total is None else replace(run, total_steps=self.steps("total", run))

    def steps(self, argument: str, run: RunLength) -> int:
        """One of the lengths, in steps.

        Args:
            argument: its name.
            run: the known lengths of the run; see `horizon`.
        """
        name = f"schedule.{argument}"
        return Length.parse(getattr(self, argument), name=name).resolve(run, name=name)

    def _decay(self, run: RunLength, rest: int) -> int:
        steps = self.steps("decay", run)
        if steps > rest:
            raise UserError(
                worded(
                    f"schedule: lr_warmup={self.lr_warmup!r} and decay={self.decay!r} together are longer than "
                    f"{_whole(run)} (config keys schedule.lr_warmup, schedule.decay)"
                )
            )
        return steps

    def _timescale(self, run: RunLength, warmup: int) -> int:
        steps = warmup if self.timescale is None else self.steps("timescale", run)
        if steps < 1:
            raise UserError(
                worded(
                    f"schedule: kind={self.kind!r} without a warm-up needs a timescale (config key schedule.timescale)"
                )
            )
        return steps

    def _require(self, ok: bool, argument: str, expected: str) -> None:
        require(ok, "schedule", argument, expected, getattr(self, argument), "schedule", "ScheduleLR")


def _whole(run: RunLength) -> str:
    return "the whole run" if run.total_steps == _ENDLESS else f"the total of {run.total_steps} steps"
