"""What a precision reaches: the loss of mixed ones against fp32, and small updates of bfloat16 parameters."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from fits import fit
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW

from stabletrain import SetPrecision, SkipNonFinite
from stabletrain.workloads.gpt import GPT


class Text(LightningModule):
    """A small GPT on a text that repeats."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = GPT(2, 4, 64, 32, 84, 0.0, False, False)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.net(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), 1e-3)


@pytest.mark.slow
def test_mixed_precisions_end_within_2_percent_of_fp32() -> None:
    """Bug: a loss scale that drops or shrinks steps, or a format that is applied twice, and a worse model."""
    torch.set_num_threads(1)
    noise = torch.Generator().manual_seed(0)
    lines = (torch.arange(33)[None] * (torch.arange(4)[:, None] + 1)).repeat(300, 1, 1)
    lines = (lines + torch.arange(300)[:, None, None]) % 84
    random = torch.randint(84, lines.shape, generator=noise)
    items = list(torch.where(torch.rand(lines.shape, generator=noise) < 0.3, random, lines))
    ends = {}
    for name, callbacks in {
        "fp32": [],
        "bf16_mixed": [SetPrecision()],
        "bf16_mixed, kept": [SetPrecision(keep_fp32=["LayerNorm", "net.head"])],
        "fp16_mixed": [SetPrecision("fp16_mixed", init_scale=2.0**20), SkipNonFinite()],
    }.items():
        module = Text()
        fit(module, items, *callbacks, log_every_n_steps=50)
        ends[name] = sum(module.losses[-20:]) / 20
    assert all(abs(loss / ends["fp32"] - 1) < 0.02 for loss in ends.values()), ends
    assert ends["fp32"] < 4.0, ends  # from 4.4


class Weights(LightningModule):
    """Weights of 1 that are pulled to 0.9 by updates of 5e-4, which bfloat16 rounds away."""

    def __init__(self, package: str, name: str, **options: Any) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(512))
        self.package, self.name, self.options = package, name, options

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weights.float() - 0.9 + batch.float()).abs().mean()

    def configure_optimizers(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make = getattr(pytest.importorskip(self.package), self.name)
        return make(self.parameters(), lr=5e-4, weight_decay=0.0, **self.options)


@pytest.mark.parametrize(
    ("package", "name", "options"),
    [
        ("optimi", "AdamW", {}),
        ("optimi", "StableAdamW", {}),
        ("torchao.optim", "_AdamW", {"bf16_stochastic_round": True}),
        ("torchao.optim", "AdamW8bit", {"bf16_stochastic_round": True}),
    ],
)
def test_bf16_true_keeps_small_updates(package: str, name: str, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an optimizer passes the check and stands still, as plain AdamW does."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    torch.manual_seed(0)
    items = list(1e-3 * torch.randn(300, 512))
    plain, full, low = (
        Weights("torch.optim", "AdamW"),
        Weights("torch.optim", "AdamW"),
        Weights(package, name, **options),
    )
    fit(full, items, log_every_n_steps=50)
    fit(low, items, SetPrecision("bf16_true"), log_every_n_steps=50)
    fit(plain, items[:20], SetPrecision("bf16_true", allow_stalling=True))
    assert torch.equal(plain.weights, torch.ones(512).bfloat16())
    assert abs(low.weights.float().mean() / full.weights.mean() - 1) < 0.01
