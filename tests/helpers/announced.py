"""A training whose loss is four times as large from one step on, by design, and callbacks that announce it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fits import fit, loader
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

import stabletrain as st
from stabletrain.core.events import Event
from stabletrain.core.outcome import Outcome
from stabletrain.runtime.guard.callbacks import GuardMember

AT, STEPS = 60, 130
"""The first step with the larger loss, and the length of the run."""
TERM = "second loss term"


class Model(LightningModule):
    """A regression of noisy values that has almost converged; its batches are numbers.

    Args:
        announces_in: hook that announces the change at step `AT`; None: none does.
        factor: on the loss, from step `AT` on.
        nan: steps with a NaN loss.
    """

    def __init__(self, announces_in: str | None = None, factor: float = 4.0, nan: range = range(0)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 2)
        nn.init.constant_(self.net.weight, 0.9)
        self.announces_in, self.factor, self.nan = announces_in, factor, nan

    def on_train_batch_start(self, batch: int, batch_idx: int) -> None:
        self._announce("on_train_batch_start", batch)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        self._announce("training_step", batch)
        x, noise = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(batch))
        loss: Tensor = (self.net(x) - x.sum(1, keepdim=True) - noise[:, :2]).square().mean() + 1.0
        loss = loss + 2.0 * 0.8**batch  # as if it had learned something: else an event says that it has not
        if batch in self.nan:
            loss = loss * torch.nan
        return loss * self.factor if batch >= AT else loss

    def on_train_batch_end(self, outputs: Any, batch: int, batch_idx: int) -> None:
        self._announce("on_train_batch_end", batch + 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9, fused=True)

    def _announce(self, hook: str, batch: int) -> None:
        if hook == self.announces_in and batch == AT:
            st.announce(self.trainer, TERM)


class Announcer(Callback):
    """Announces the change at the end of the batch before it."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: int, batch_idx: int) -> None:
        if batch + 1 == AT:
            st.announce(trainer, TERM)


class Record(GuardMember):
    """Records outcomes and events; saves a checkpoint after a batch, if a path is given."""

    def __init__(self, save_after: int = -1, path: Path | None = None) -> None:
        self.outcomes: list[Outcome] = []
        self.events: list[Event] = []
        self.save_after, self.path = save_after, path

    @property
    def state_key(self) -> str:
        return "record"

    def on_outcome(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def on_stability_event(self, trainer: Trainer, module: LightningModule, event: Event) -> None:
        self.events.append(event)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.path is not None and batch == self.save_after:
            trainer.save_checkpoint(self.path)

    def kinds(self, *without: str) -> list[str]:
        return [event.kind for event in self.events if event.kind not in without]


def stack(mode: Any = "exact", **options: Any) -> list[Any]:
    """Every rule with a baseline, with short windows."""
    window = {"window": 32, "min_samples": 16}
    return [
        st.ClipZScore(warmup_steps=20),
        st.SkipOutliers.olmo(window=32, keep_outliers=False, max_in_a_row=200),  # drops every outlier
        st.DetectSpikes(**window, delay=4, patience=8, regime_after=8, **options),
        st.SkipNonFinite(),
        st.Guard(mode=mode),
    ]


def train(model: Model, *callbacks: Callback, start: int = 0, steps: int = STEPS, **options: Any) -> Trainer:
    items: Any = list(range(start, steps))
    return fit(model, loader(items, sized=False), *callbacks, **{"max_steps": steps, **options})
