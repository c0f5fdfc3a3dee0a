"""What a checkpoint needs that is saved within an optimizer step: the state of the run at the step's beginning."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from stabletrain.runtime import rng
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.data.epoch_state import EpochMark, EpochState
from stabletrain.runtime.data.train_loader import Places, TrainLoader
from stabletrain.runtime.internals import resuming
from stabletrain.runtime.internals import state as state_internals
from stabletrain.runtime.internals.resuming import BatchCount


class _Start(NamedTuple):
    """The run before the first batch of an optimizer step was fetched."""

    batches: BatchCount
    rng: rng.QuickState
    places: Places
    rewinds: int
    epoch: EpochMark


class StepWatch:
    """Keeps the state at the beginning of the optimizer step in progress (about 8 microseconds at each step).

    A checkpoint within a step is saved after an exception, by a signal handler, or between two micro-batches. What the
    step has done so far is left out of it, and the resumed run makes the whole step.

    Args:
        trainer: in a fit.
        module: that is trained.
        loader: of the run.
        epoch: what the epoch gathers.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, loader: TrainLoader, epoch: EpochState) -> None:
        self._trainer, self._module, self._loader, self._epoch = trainer, module, loader, epoch
        self._window = AccumulationWindow(trainer)
        self._start: _Start | None = None
        self._buffers: _Buffers | None = None
        self._problem = ""

    # ---- called in the loop -----------------------------------------------------------------------------------------

    def start_batch(self) -> None:
        """A batch will be fetched."""
        if self._start is not None and self._window.is_open:
            return
        batches = resuming.batch_count(self._trainer)
        places, rewinds = self._loader.places(), self._loader.rewinds
        self._start = _Start(batches, rng.capture_quickly(), places, rewinds, self._epoch.mark())
        self._problem = ""
        if self._buffers is None:
            self._buffers = _Buffers(self._module)
        self._buffers.stash()

    def update_begins(self) -> None:
        """The optimizer will change the weights."""
        self._problem = "the optimizer was updating the weights"

    def validation_begins(self) -> None:
        """A validation starts: callbacks such as EarlyStopping count it, so it cannot be repeated."""
        if self.in_step:
            self._problem = "a validation ran between the micro-batches of the step"

    def clear(self) -> None:
        """Forget the step: the run was set back."""
        self._start = None

    # ---- for a checkpoint -------------------------------------------------------------------------------------------

    @property
    def in_step(self) -> bool:
        """Whether a step was begun and not finished."""
        if self._start is None or self._start.rewinds != self._loader.rewinds:  # a rollback has undone the step
            return False
        batch_is_unfinished = resuming.batch_count(self._trainer).run == self._start.batches.run
        return batch_is_unfinished or self._has_begun

    @property
    def _has_begun(self) -> bool:
        """Whether the module has seen a batch of it."""
        return self._window.is_open or resuming.is_in_batch(self._trainer)

    def state(self, hidden: list[str]) -> dict[str, Any]:
        """The run at the beginning of the step, as tensors and plain Python types.

        Args:
            hidden: the hidden state of the module that training changes, by name: it cannot be set back.
        """
        assert self._start is not None
        assert self._buffers is not None
        before = self._buffers.before()
        problem = self._problem
        if before is None and not problem:
            problem = "a buffer of the module had changed"
        if hidden and self._has_begun and not problem:
            problem = f"the step may have changed the hidden state of the module ({', '.join(hidden[:4])})"
        return {
            "rng": self._start.rng.to_state(),
            "loaders": [each.to_plain() for each in self._loader.positions(self._start.places)],
            "epoch": self._epoch.state_dict(self._start.epoch),
            "unfinished": {"batches": self._start.batches._asdict(), "problem": problem, "buffers": before or {}},
        }


class _Buffers:
    """Copies of the running statistics of normalisation layers, and whether other buffers have changed.

    Args:
        module: with the buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._names: list[str] = []
        self._statistics: list[tuple[dict[str, Any], str]] = []
        self._others: list[tuple[dict[str, Any], str]] = []
        for path, owner in module.named_modules():
            buffers = state_internals.buffers_of(owner)
            normalises = isinstance(owner, nn.modules.batchnorm._NormBase)
            for name, value in buffers.items():
                if normalises and value is not None:
                    self._names.append(f"{path}.{name}" if path else name)
                    self._statistics.append((buffers, name))
                else:
                    self._others.append((buffers, name))
        self._copies = [buffers[name].detach().clone() for buffers, name in self._statistics]
        self._seen: list[tuple[Any, int]] = []

    def stash(self) -> None:
        """Remember the buffers as they are now."""
        if self._copies:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, [buffers[name] for buffers, name in self._statistics])
        self._seen = self._versions()

    def before(self) -> dict[str, Tensor] | None:
        """The statistics at the last `stash`, by name; None if another buffer has changed since."""
        same = all(a is b and v == w for (a, v), (b, w) in zip(self._seen, self._versions(), strict=True))
        if not same:
            return None
        return {name: copy.clone() for name, copy in zip(self._names, self._copies, strict=True)}

    def _versions(self) -> list[tuple[Any, int]]:
        found = [owner.get(name) for owner, name in self._others]
        return [(each, -1 if each is None or each.is_inference() else each._version) for each in found]
