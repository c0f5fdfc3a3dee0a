"""A loss that creeps up in a training: reported, or rolled back where the user asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fits import EventRecorder
from going_back import Model, Sample, Samples
from torch import Tensor
from torch.utils.data import DataLoader

import stabletrain as st
from stabletrain.testing.toy import quiet
from stabletrain.testing.trainer import quiet_trainer

BEGIN = 200
"""The first step of the rise."""


class NoisyTargets(Samples):
    """The noise of the targets grows from a sample on."""

    def __getitem__(self, index: int) -> Sample:
        x, y, _ = super().__getitem__(index)
        noise = torch.randn(1, generator=torch.Generator().manual_seed(index)).sign()
        return x, y + noise * (1.0 + 0.03 * max(0, index // 4 - BEGIN)), index


class Regression(Model):
    """Without the logs and metrics of its base class."""

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y, _ = batch
        return (self.net(x) - y).square().mean()


@pytest.mark.parametrize("reaction", ["report", "rollback"])
def test_a_slow_rise_in_a_training(tmp_path: Path, reaction: str) -> None:
    """Bugs: a rollback that nobody asked for; none where it is asked for; the rollback's own rise reported for ever."""
    torch.manual_seed(0)
    plugin, recorder = st.Rollback(on_slow_rise=reaction, z_threshold=1e6, max_rollbacks=1), EventRecorder()
    trainer = quiet_trainer(
        plugin, recorder, max_epochs=1, default_root_dir=tmp_path, limit_val_batches=0, log_every_n_steps=50
    )
    rolled_back = reaction == "rollback"
    with quiet():
        if rolled_back:
            with pytest.raises(st.TrainingStopped, match="the loss has risen slowly"):
                trainer.fit(Regression(dropout=0.0, scheduler=None), DataLoader(NoisyTargets(size=1600), 4))
        else:
            trainer.fit(Regression(dropout=0.0, scheduler=None), DataLoader(NoisyTargets(size=1600), 4))
    slow = [event for event in recorder.events if "slowly" in event.reason and event.kind == "divergence"]
    assert len(slow) == 1 + rolled_back, "the rise is in the data: it comes again after the rollback"
    assert all(event.step > BEGIN for event in slow)
    assert plugin.rollbacks == rolled_back
    made = [event.reason for event in recorder.events if event.kind == "rollback"]
    assert len(made) == rolled_back
    assert all("slowly" in reason for reason in made)
