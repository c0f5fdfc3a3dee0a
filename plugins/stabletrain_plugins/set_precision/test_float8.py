"""float8: which layers are converted, that they are put back, and where it is refused. Skipped without torchao."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from fits import HEALTHY, batches, fit, loader
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW

from stabletrain import SetPrecision
from stabletrain.errors import UserError
from stabletrain.testing.trainer import quiet_trainer
from stabletrain_plugins.set_precision import float8

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torchao.float8")

ITEMS = batches(*[HEALTHY] * 4)


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


class Layers(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.odd, self.b = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 32)
        self.c, self.head = nn.Linear(32, 32, bias=False), nn.Linear(32, 16)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.cat([batch[0]] * 3, 1)[:, :16]
        self.classes = {name: type(each).__name__ for name, each in self.named_children()}
        self.keys = list(self.state_dict())
        return self.head(self.c(self.b(self.odd(self.a(x))))).float().square().mean()

    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), 0.01)


def fp8(**arguments: Any) -> SetPrecision:
    return SetPrecision("fp8", emulate=True, **arguments)


def converted(module: Layers, precision: SetPrecision) -> list[str]:
    fit(module, ITEMS, precision)
    return [name for name, kind in module.classes.items() if kind == "Float8Linear"]


def test_layers_are_converted_for_the_fit_only() -> None:
    """Bugs: the output layer, or one whose dimensions do not fit, in float8; other parameters or keys after the fit."""
    module = Layers()
    before, keys = dict(module.named_parameters()), list(module.state_dict())
    assert converted(module, fp8()) == ["a", "c"]
    assert module.keys == keys
    assert {type(each) for each in module.children()} == {nn.Linear}
    assert all(p is before[name] for name, p in module.named_parameters())
    assert list(module.state_dict()) == keys
    assert converted(Layers(), fp8(fp8_skip=[], fp8_recipe="rowwise")) == ["a", "c", "head"]
    assert converted(Layers(), fp8(fp8_skip=["c"])) == ["a", "head"]
    assert converted(Layers(), fp8(fp8_skip=[], keep_fp32=["c"])) == ["a", "head"]


def test_validate_test_and_predict() -> None:
    """Bug: within inference mode torchao's tensors lack operations, so that only the validation of a fit works."""

    class Evaluated(Layers):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.training_step(batch, batch_idx), batch_size=8)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.training_step(batch, batch_idx)

    module, items, trainer = Evaluated(), loader(ITEMS[:1]), quiet_trainer(fp8())
    expected = fit(module, ITEMS, fp8(), val_items=items).callback_metrics["loss"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        for evaluate in (trainer.validate, trainer.test):
            assert evaluate(module, items, verbose=False)[0]["loss"] == expected.item()
        assert torch.equal(trainer.predict(module, items)[0], expected)
    assert trainer.validate_loop.inference_mode


def test_a_layer_of_a_class_of_its_own_and_a_tied_one_are_left_alone() -> None:
    """Bugs: the forward of a subclass of Linear is lost; the embedding's weight is multiplied in float8."""

    class Own(nn.Linear):
        pass

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
            self.own, self.last = Own(16, 16), nn.Linear(16, 16)
            self.head.weight = self.embedding.weight

    assert list(float8.choose(Tied(), None, ())) == ["last"]


@pytest.mark.parametrize("skip", [["*"], ["nothing"]])
def test_skipping_all_layers_or_none_is_an_error(skip: list[str]) -> None:
    with pytest.raises(UserError, match="no linear layer"):
        fit(Layers(), ITEMS, fp8(fp8_skip=skip))


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 6)])
def test_a_device_without_float8_is_refused(capability: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: torchao computes on a CPU without a complaint, slowly."""
    if capability is None:
        with pytest.raises(UserError, match=r"8\.9 or higher.*got a CPU.*SetPrecision\(emulate=True\)"):
            fit(Layers(), ITEMS, SetPrecision("fp8"))
        return
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UserError, match=f"got a GPU of {capability[0]}"):
        float8.check_device(torch.device("cuda"), emulate=False)
    float8.check_device(torch.device("cuda"), emulate=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    float8.check_device(torch.device("cuda"), emulate=False)
