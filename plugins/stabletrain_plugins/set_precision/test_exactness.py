"""Skip, rollback and resume are exact in every precision; fp16 with a fall-back resumes anywhere."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEALTHY, NAN_LOSS, SaveAfter, assert_same, batches, everything, fit
from going_back import GoBack
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW

from stabletrain import ResumeExactly, SetPrecision, SkipNonFinite

BAD = (0, 4, 9, 10)
STEPS = 20


def kahan(parameters: Any) -> Any:
    """torch-optimi's AdamW, which sums rounding errors of bf16 parameters by itself."""
    from optimi import AdamW as Kahan

    return Kahan(parameters, lr=0.01)


def stochastic(parameters: Any) -> Any:
    """torchao's AdamW, which draws from the global generator at each step."""
    from torchao.optim import _AdamW

    return _AdamW(parameters, 0.01, bf16_stochastic_round=True)


def installed(*packages: str) -> Any:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


class Wide(LightningModule):
    """Layers that float8 can convert, in any dtype; a batch is ``(x, fault)`` as of `fits.batches`, widened."""

    def __init__(self, make: Callable[[Any], Any] = lambda p: AdamW(p, 0.01)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32))
        self.head = nn.Linear(32, 1)
        self.make, self.factor, self.losses = make, 1.0, list[float]()

    def training_step(self, batch: tuple[Tensor, int], batch_idx: int) -> Tensor:
        x, fault = batch
        wide = torch.cat([x, x, x], 1)[:, :16]
        y = self.head(self.body(wide)).float()
        loss = (y - x.float().sum(1, keepdim=True)).square().mean() * self.factor
        self.losses.append(loss.item())
        return loss * float("nan") if fault == NAN_LOSS else loss

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


@pytest.fixture(autouse=True)
def _torchao_without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("torchao") is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchao.float8
            import torchao.optim  # noqa: F401
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


SETTINGS: dict[str, Any] = {
    "bf16_mixed": ({"keep_fp32": ["LayerNorm", "head"]}, None),
    "fp16_mixed": ({"kind": "fp16_mixed", "keep_fp32": ["head"], "init_scale": 2.0**24}, None),
    "fall back": (
        {"kind": "fp16_mixed", "init_scale": 2.0**30, "min_scale": 2.0**27, "fall_back": "bf16", "cool_down": 6},
        None,
    ),
    "tf32": ({"kind": "tf32"}, None),
    "bf16_true, Kahan": ({"kind": "bf16_true", "keep_fp32": ["LayerNorm"]}, kahan),
    "bf16_true, stochastic": ({"kind": "bf16_true"}, stochastic),
    "fp8": ({"kind": "fp8", "emulate": True}, None),
}
NEEDS = {"bf16_true, Kahan": "optimi", "bf16_true, stochastic": "torchao", "fp8": "torchao"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[installed(NEEDS[n])] if n in NEEDS else []) for n in SETTINGS])
def test_skip_rollback_and_resume_are_exact(name: str, tmp_path: Path) -> None:
    """Bugs: a dropped step draws a random number or moves the scale; kept fp32 weights are rounded by a resume; a
    fall-back that a rollback or a resume forgets."""
    arguments, make = SETTINGS[name]

    def train(items: Any, *callbacks: Any, **options: Any) -> Any:
        module = Wide() if make is None else Wide(make)
        precision = SetPrecision(**arguments, report_every=3)
        torch.manual_seed(1)
        done = fit(module, items, *callbacks, precision, SkipNonFinite(), **options)
        return {**everything(done), "rng": torch.get_rng_state(), "left": torch.tensor(precision._left)}

    good = batches(*[HEALTHY] * STEPS)
    faulty = list(good)
    for at in BAD:
        faulty.insert(at, (good[at][0], NAN_LOSS))
    cuts = [SaveAfter(cut, tmp_path / f"{cut}.ckpt") for cut in (2, 12)]
    whole = train(good)
    assert_same(whole, train(faulty, ResumeExactly(), *cuts))
    back = GoBack(3, (7, 11, 17))
    assert_same(whole, train(good, back))
    assert back.went_back == 3
    for cut in cuts:
        assert_same(whole, train(faulty, ResumeExactly(), ckpt_path=cut.path))
