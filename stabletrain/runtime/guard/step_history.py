"""What the guard knows of the steps so far: of the run, and of each optimizer; part of every checkpoint.

A module that steps by hand may have several optimizers, and the history of a discriminator's losses says nothing about
the generator's: each optimizer has its own. What plugins know is kept apart by `PerOptimizer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from stabletrain.core.loss_scale import ScaleHistory
from stabletrain.core.outcome import Outcome
from stabletrain.core.state import from_plain, to_plain
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.guard.changes import Changes
from stabletrain.runtime.guard.dropped_steps import StepSamples
from stabletrain.runtime.guard.metrics import Counters, MetricsWindow
from stabletrain.runtime.guard.rewarming import Rewarming
from stabletrain.runtime.guard.step_control import StepControl
from stabletrain.runtime.guard.trained_parameters import TrainedParameters
from stabletrain.runtime.ranks import Ranks


class OptimizerSteps:
    """The steps that one optimizer has made, and the one in progress.

    Args:
        trainer: of the guard.
    """

    parameters: TrainedParameters
    samples: StepSamples

    def __init__(self, trainer: Trainer) -> None:
        self.window = AccumulationWindow(trainer)
        self.metrics = MetricsWindow()
        self.counters = Counters()
        """Its own steps, counted if the module steps by hand; those of the run are in `StepHistory`."""
        self.scales = ScaleHistory()
        self.lr: float | Tensor = math.nan
        """The learning rate of the last step."""
        self._control: StepControl | None = None

    def begin(self, control: StepControl, module: LightningModule, ranks: Ranks) -> None:
        """A fit begins, in which ``control`` wraps the optimizer's step."""
        self._control = control
        self.samples = StepSamples(control.trainer, ranks)
        self.parameters = TrainedParameters(control.optimizer, module, lambda: control.trainer.global_step)

    @property
    def control(self) -> StepControl:
        """The step control of this fit."""
        assert self._control is not None, "the guard acts only after on_fit_start"
        return self._control

    def start_window(self) -> None:
        """A window of micro-batches begins; before the fit has begun nothing happens."""
        if self._control is not None:
            self.window.is_started = True
            self.parameters.put_back()
            self._control.start_window()

    def forget_window(self) -> None:
        """Forget the micro-batches of the window in progress."""
        self.window.clear()
        self.samples.clear()


class StepHistory:
    """The steps of a run so far.

    Args:
        trainer: of the guard.
        rewarming: whose state is saved with it.
        changes: as ``rewarming``.
    """

    def __init__(self, trainer: Trainer, rewarming: Rewarming, changes: Changes) -> None:
        self._trainer, self._rewarming, self._changes = trainer, rewarming, changes
        self.counters = Counters()
        """The steps of the run."""
        self.each = [OptimizerSteps(trainer)]
        """The steps of each optimizer; of a module that does not step by hand, of the only one."""
        self.names: Sequence[str] = [""]
        """Of the optimizers; of a single one empty."""
        self.selected = 0
        """Index of the optimizer whose step is in progress, or was the last one in this batch."""
        self._by_hand = False

    @property
    def own(self) -> OptimizerSteps:
        """The steps of the selected optimizer."""
        return self.each[self.selected]

    @property
    def counted(self) -> list[Counters]:
        """The steps that each optimizer counts; if Lightning steps, those of the run."""
        return [each.counters for each in self.each] if self._by_hand else [self.counters]

    def begin(
        self, controls: Sequence[StepControl], module: LightningModule, ranks: Ranks, names: Sequence[str] | None
    ) -> None:
        """A fit begins; the history of optimizers that were known before goes on.

        Args:
            controls: of each optimizer.
            module: the module that is trained.
            ranks: of the fit.
            names: of the optimizers, if the module steps by hand.
        """
        self._by_hand, self.names = names is not None, [""] if names is None else names
        self._grow(len(controls))
        self.each, self.selected = self.each[: len(controls)], 0
        for own, control in zip(self.each, controls, strict=True):
            own.begin(control, module, ranks)

    def add(self, outcome: Outcome, scaled: bool = False) -> None:
        """Add a step of the selected optimizer.

        Args:
            outcome: of the step.
            scaled: whether there is a loss scaler.
        """
        own = self.own
        if scaled:
            own.scales = own.scales.add(outcome)
        self.counters = self.counters.add(outcome)
        if self._by_hand:
            own.counters = own.counters.add(outcome)
        own.metrics.add(outcome)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """For a checkpoint, in plain Python types."""
        own = {
            "rewarm": self._rewarming.state(),
            "scales": to_plain(self.own.scales),
            "announced": list(self._changes.announced),
            "passed": self._changes.passed,
        }
        if self._by_hand:
            own["optimizers"] = [
                {"counters": each.counters._asdict(), "scales": to_plain(each.scales)} for each in self.each
            ]
        return {"counters": self.counters._asdict(), "guard": own}

    def load(self, state: Mapping[str, Any], has_optimizers: bool) -> None:
        """Restore what `state` returned; what is missing stays as it is.

        Args:
            state: may be empty.
            has_optimizers: whether it is known how many optimizers there are.
        """
        if "counters" in state:
            self.counters = _counters(state["counters"])
        if "guard" in state:
            self._rewarming.load(state["guard"]["rewarm"])
            self.own.scales = from_plain(ScaleHistory, state["guard"]["scales"])
            self._changes.announced = from_plain(tuple[str, ...], state["guard"]["announced"])
            self._changes.passed = from_plain(dict[str, int], state["guard"].get("passed", {}))
            saved = state["guard"].get("optimizers", [])
            if not has_optimizers:
                self._grow(len(saved))
            for own, each in zip(self.each, saved, strict=False):
                own.counters = _counters(each["counters"])
                own.scales = from_plain(ScaleHistory, each["scales"])

    def go_back(self, state: Mapping[str, Any]) -> None:
        """The run goes back to an earlier step: restore all but the counts of steps, and forget windows in progress.

        Args:
            state: what `state` returned at that step; may be empty.
        """
        self._changes.passed = {}  # positions are passed again
        in_a_row = state.get("counters", {}).get("overflows_in_a_row", 0)
        counted = [each.counters for each in self.each]
        run = {**self.counters._asdict(), "overflows_in_a_row": in_a_row}
        self.load({**state, "counters": run}, has_optimizers=True)
        for own, counters in zip(self.each, counted, strict=True):
            own.counters = counters
            own.forget_window()

    def _grow(self, number: int) -> None:
        """Know of at least so many optimizers."""
        self.each += [OptimizerSteps(self._trainer) for _ in range(number - len(self.each))]


def _counters(saved: Mapping[str, Any]) -> Counters:
    return from_plain(Counters, {**Counters()._asdict(), **saved})
