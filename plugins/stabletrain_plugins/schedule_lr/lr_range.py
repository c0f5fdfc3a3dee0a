"""The schedule of ``stabletrain lr-range``: a rate that rises from step to step, until the loss does."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from stabletrain.core.curves import Curve
from stabletrain.core.lengths import RunLength
from stabletrain.core.lr_range import FEWEST_STEPS, RangeEnd, Rising
from stabletrain.core.outcome import Outcome
from stabletrain.errors import UserError, is_number, is_whole, require
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.internals.trainer import restore_step_hooks
from stabletrain.runtime.records.lr_range_file import LRRangeFile
from stabletrain.runtime.records.run_files import LR_RANGE
from stabletrain_plugins.schedule_lr.schedule import ScheduleLR

logger = logging.getLogger("stabletrain")


class LRRange(ScheduleLR):
    """Raise the learning rate from ``start`` to ``stop``, and end the training once the loss has risen.

    The rate grows by the same factor with every applied step; the groups' rates keep their ratios. The training ends
    after ``steps``, or earlier, see `stabletrain.core.lr_range.RangeEnd`. Rate, loss and gradient norm of every
    attempted step are written to ``lr_range.csv`` in the run's folder (``default_root_dir``).

    Args:
        start: learning rate of the first step, > 0.
        stop: learning rate of the last step, > start.
        steps: applied steps from start to stop, >= 20.
        base: the rate of the optimizer that becomes start; None: that of its first group.

    Raises:
        UserError: if an argument is out of range; when training starts, if the optimizer has no rate to scale.
    """

    def __init__(self, start: float = 1e-6, stop: float = 1.0, steps: int = 200, base: float | None = None) -> None:
        for name, value, ok, expected in (
            ("start", start, is_number(start) and 0 < start < math.inf, "a number > 0"),
            ("stop", stop, is_number(stop) and is_number(start) and start < stop < math.inf, f"a number > {start}"),
            ("steps", steps, is_whole(steps) and steps >= FEWEST_STEPS, f"a whole number >= {FEWEST_STEPS}"),
            ("base", base, base is None or (is_number(base) and 0 < base < math.inf), "a number > 0, or None"),
        ):
            require(ok, "lr_range", name, expected, value, "schedule", "LRRange")
        self.start, self.stop, self.length, self.base = start, stop, int(steps), base
        self._end, self._applied = RangeEnd(self.length), 0
        self._file: LRRangeFile | None = None
        super().__init__("constant", lr_warmup=0)

    def curve(self, run: RunLength) -> Curve:
        """The rising curve, as shares of the optimizer's own rate; it does not depend on the run.

        Args:
            run: the known lengths of the run.
        """
        return Rising(self.start / self._own_rate, self.stop / self._own_rate, self.length)

    def reset(self) -> None:
        """Forget an earlier test."""
        super().reset()
        self._end, self._applied = RangeEnd(self.length), 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the guard, or make one: the outcomes of the steps come from it."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._guard is None:
            restore_step_hooks(self)
            GuardMember.setup(self, trainer, pl_module, stage)

    def on_optimizer_ready(self, trainer: Trainer) -> None:
        """Take over the learning rate."""
        super().on_optimizer_ready(trainer)
        first = self._bases[0].first if self._bases else math.nan
        if not 0 < first < math.inf:
            raise UserError(
                f"lr-range: expected an optimizer with a learning rate > 0, got {first!r}, which cannot be scaled; "
                "choose one with a rate, such as optimizer=adamw"
            )

        if trainer.is_global_zero and not self._said:
            logger.info("learning-rate range test: %g to %g in %d steps", self.start, self.stop, self.length)
        self._said = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the file."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            self._file = LRRangeFile(Path(trainer.default_root_dir) / LR_RANGE)

    def on_outcome(self, outcome: Outcome) -> None:
        """Write the step down, and end the training if the loss has risen; all ranks know the same loss."""
        if self._file is not None:
            self._file.append(self.factor(self._applied) * self._own_rate, outcome)
        self._applied += outcome.applied
        assert self._guard is not None, "outcomes come from a guard"
        if not outcome.no_loss and self._end.add(outcome.loss):
            self._guard.trainer.should_stop = True
        super().on_outcome(outcome)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the file."""
        super().on_exception(trainer, pl_module, exception)
        self._close_file()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file."""
        super().teardown(trainer, pl_module, stage)
        self._close_file()

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies do not include the open file."""
        return {**super().__getstate__(), "_file": None}

    @property
    def _own_rate(self) -> float:
        """The rate of the optimizer, of which `factor` is a share; known once the optimizer exists."""
        bases = self.__dict__.get("_bases")
        return self.base or (bases[0].first if bases else self.start)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
