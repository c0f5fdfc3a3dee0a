"""What is computed in which format, what is refused, and what is left of it after a fit."""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path
from typing import Any

import gan
import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from fits import HEALTHY, EventRecorder, Net, SaveAfter, assert_same, batches, everything, fit, loader, trainer
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from stabletrain import SetPrecision
from stabletrain.errors import UserError
from stabletrain.testing.toy import OtherToyModule, ToyBatches, ToyModule, quiet
from stabletrain_plugins.set_precision import kept_modules
from stabletrain_plugins.set_precision.stalling import refuse_stalling

ITEMS = batches(*[HEALTHY] * 12)


class Formats(Callback):
    """Records the dtypes of inputs and output of modules in the first batch."""

    def __init__(self, *names: str) -> None:
        self.names, self.found = names, dict[str, tuple[Any, Any]]()

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        for name in self.names:
            pl_module.get_submodule(name).register_forward_hook(functools.partial(self._note, name))

    def _note(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.found.setdefault(name, (inputs[0].dtype, output.dtype))


def weights(module: LightningModule, *callbacks: Callback, **options: Any) -> dict[str, Tensor]:
    return everything(fit(module, ITEMS, *callbacks, **options))


def test_a_network_kept_by_its_name_trains_as_in_fp32() -> None:
    """Bug: something between the layers stays under autocast, or an input is rounded."""
    plain = weights(Net())
    assert_same(plain, weights(Net(), SetPrecision(keep_fp32=["net"])))
    lower = weights(Net(), SetPrecision())
    assert not torch.equal(plain["module.net.0.weight"], lower["module.net.0.weight"])


@pytest.mark.parametrize("kind", ["bf16_mixed", "fp16_mixed"])
def test_kept_modules_compute_in_fp32_and_are_as_before_after_the_fit(kind: Any) -> None:
    """Bugs: fp16 is silently bf16 on a CPU; a wrapper stays after the fit or after an exception."""
    low = torch.bfloat16 if kind == "bf16_mixed" else torch.float16
    for raise_at in (None, 3):
        module, formats = Net(), Formats("net.0", "net.4")
        module.raise_at = raise_at
        precision = SetPrecision(kind, keep_fp32=["net.4"])
        if raise_at is None:
            fit(module, ITEMS, precision, formats)
        else:
            with pytest.raises(RuntimeError, match="own bug"):
                fit(module, ITEMS, precision, formats)
        assert formats.found["net.0"][1] == low
        assert formats.found["net.4"][1] == torch.float32
        assert [row.split()[0] for row in precision.table] == ["module", "net.4"]
        assert not any("forward" in vars(each) for each in module.modules())


class Deep(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(3)])
        self.attention = nn.MultiheadAttention(6, 1)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["blocks.1"], ["blocks.1"]),
        (["blocks.*.1"], ["blocks.0.1", "blocks.1.1", "blocks.2.1"]),
        (["LayerNorm", "blocks.1"], ["blocks.0.1", "blocks.2.1", "blocks.1"]),
        (["torch.nn.LayerNorm", "blocks.0.1"], ["blocks.0.1", "blocks.1.1", "blocks.2.1"]),
        (["attention", "attention.out_proj"], ["attention"]),
        (["Linear"], [*(f"blocks.{i}.0" for i in range(3)), "attention.out_proj"]),  # a subclass of Linear, too
    ],
)
def test_modules_are_found_by_name_pattern_or_class(entries: list[str], expected: list[str]) -> None:
    """Bug: a module inside a kept one is wrapped again; an exact name is taken for a class."""
    assert [each.name for each in kept_modules.find(Deep(), entries)] == expected


@pytest.mark.parametrize(
    ("entry", "text"),
    [("blocks.7", "did you mean 'blocks"), ("LayerNrom", "did you mean 'LayerNorm'"), ("x", "neither")],
)
def test_an_entry_that_chooses_nothing_is_an_error(entry: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        kept_modules.find(Deep(), [entry])


def test_a_copy_of_the_module_has_a_forward_of_its_own() -> None:
    """Bug: a model that is averaged or evaluated beside the trained one computes with the trained one's weights."""

    class Copies(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.copy = copy.deepcopy(pl_module.net)
            self.copy[0].weight.data.zero_()
            self.copy[0].bias.data.zero_()
            self.output = self.copy[0](ITEMS[0][0])

    copies = Copies()
    fit(Net(), ITEMS, SetPrecision(keep_fp32=["net.0"]), copies)
    assert not copies.output.any()


class Attention(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.attention(batch[0], batch[0], batch[0])[0].square().mean()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), 0.1)


def test_a_module_whose_forward_is_not_called_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: the output projection of attention is listed as kept, and computed in bfloat16 by its owner."""
    fit(Attention(), ITEMS, SetPrecision(keep_fp32=["attention.out_proj"]))
    assert "the forward of attention.out_proj was not called" in caplog.text


# ---- bf16_true ------------------------------------------------------------------------------------------------------


class Half(Net):
    """Works with parameters in bfloat16."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.lr, self.dtypes = lr, dict[str, torch.dtype]()

    def configure_optimizers(self) -> Any:
        self.dtypes = {name: p.dtype for name, p in self.named_parameters()}
        return AdamW(self.parameters(), self.lr)


def test_kept_parameters_are_fp32_before_the_optimizer_is_made_and_never_rounded(tmp_path: Path) -> None:
    """Bug: they are cast to bfloat16 and back, so that a resumed run has other weights than the checkpoint."""
    options: dict[str, Any] = {"keep_fp32": ["net.4", "BatchNorm1d"], "allow_stalling": True}
    module = Half()
    first = everything(fit(module, ITEMS[:6], SetPrecision("bf16_true", **options), SaveAfter(5, tmp_path / "a.ckpt")))
    low, full = torch.bfloat16, torch.float32
    assert [module.dtypes[f"net.{i}.weight"] for i in (0, 1, 4)] == [low, full, full]
    assert first["module.net.1.running_mean"].dtype == full
    assert not torch.equal(first["module.net.4.weight"].bfloat16().float(), first["module.net.4.weight"])
    again = Half()
    fit(again, ITEMS[:6], SetPrecision("bf16_true", **options), ckpt_path=tmp_path / "a.ckpt", max_epochs=1)
    assert torch.equal(again.net[4].weight, first["module.net.4.weight"].requires_grad_())


def test_a_parameter_of_a_kept_and_another_module_is_refused() -> None:
    """Bug: a tied weight gets the dtype of the module that was converted last."""

    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(6, 16)
            self.other.weight = self.net[0].weight  # type: ignore[assignment]

    with pytest.raises(UserError, match=r"other.weight is also a parameter of a module that is kept"):
        fit(Tied(), ITEMS, SetPrecision("bf16_true", keep_fp32=["net.0"]))


def test_bf16_true_needs_an_optimizer_that_keeps_small_updates() -> None:
    """Bugs: training stops moving without an error; a run whose parameters are all kept is refused."""
    with pytest.raises(UserError, match=r"bf16_true with AdamW.*adamw_kahan.*SetPrecision\(allow_stalling=True\)"):
        fit(Half(), ITEMS, SetPrecision("bf16_true"))
    fit(Half(), ITEMS[:2], SetPrecision("bf16_true", allow_stalling=True))
    fit(Half(), ITEMS[:2], SetPrecision("bf16_true", keep_fp32=["net"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("package", "name", "options", "stalls"),
    [
        ("torch.optim", "AdamW", {}, True),
        ("optimi", "AdamW", {}, False),
        ("optimi", "StableAdamW", {"kahan_sum": True}, False),
        ("optimi", "Lion", {"kahan_sum": False}, True),
        ("torchao.optim", "AdamW8bit", {}, True),
        ("torchao.optim", "AdamW8bit", {"bf16_stochastic_round": True}, False),
        ("torchao.optim", "_AdamW", {"bf16_stochastic_round": True}, False),
        ("pytorch_optimizer", "StableAdamW", {"kahan_sum": True}, False),
        ("pytorch_optimizer", "StableAdamW", {"kahan_sum": False}, True),
        ("bitsandbytes.optim", "AdamW8bit", {}, True),
    ],
)
def test_optimizers_are_judged_by_what_they_are(package: str, name: str, options: Any, stalls: bool) -> None:
    """Bugs: Kahan summation that was switched off is accepted; one that is on by default is refused."""
    parameters = [nn.Parameter(torch.ones(4).bfloat16())]
    made = getattr(pytest.importorskip(package), name)(parameters, lr=0.1, **options)
    if stalls:
        with pytest.raises(UserError, match=f"bf16_true with {name}: .* rounds each update"):
            refuse_stalling([made], nn.Module())
    else:
        refuse_stalling([made], nn.Module())


# ---- the Trainer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning])
def test_it_works_in_both_packages_and_survives_the_fit(package: Any) -> None:
    """Bugs: clipping of the other package's Trainer is left out; no loss scale in a checkpoint after the fit."""
    precision = SetPrecision("fp16_mixed", init_scale=256.0)
    with quiet():
        trainer = package.Trainer(
            callbacks=[precision], max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, gradient_clip_val=1e-9,
        )  # fmt: skip
        module = (OtherToyModule if package is pytorch_lightning else ToyModule)(lambda p: SGD(p, 1.0))
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        trainer.fit(module, torch.utils.data.DataLoader(ToyBatches(steps=3), batch_size=None))
    assert trainer.precision == "16-mixed"
    assert isinstance(trainer.precision_plugin.scaler, torch.amp.GradScaler)
    assert type(trainer.precision_plugin).__module__.startswith(package.__name__)
    assert all(torch.allclose(p, before[name], atol=1e-7) for name, p in module.named_parameters()), "not clipped"
    assert trainer.precision_plugin.state_dict()["scale"] == 256.0


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"precision": "64-true"}, {"fp16": True}])
def test_a_precision_of_the_trainer_is_a_conflict(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the Trainer has a precision of its own"):
        fit(Net(), ITEMS, SetPrecision(), **options)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"kind": "fp16_mixed"}, "no loss scaling"),
        ({"kind": "bf16_true", "keep_fp32": ["net.4"]}, "before it could be converted"),
    ],
)
def test_what_cannot_be_done_with_fsdp2_is_refused(arguments: dict[str, Any], text: str) -> None:
    """Bug: an error of torch in the first step, about dtypes of a group of shards."""
    sharded = trainer(strategy=ModelParallelStrategy(), accelerator="cpu")
    with pytest.raises(UserError, match=text):
        SetPrecision(**arguments).prepare_trainer(sharded, Net())
    SetPrecision(keep_fp32=["net.4"]).prepare_trainer(sharded, Net())
    assert sharded.precision == "bf16-mixed"


def test_validation_after_the_fit_computes_in_the_same_formats() -> None:
    """Bug: the wrappers are gone when the same Trainer validates, or stay after that."""
    precision, formats, module = SetPrecision(keep_fp32=["net.4"]), Formats("net.0", "net.4"), Net()
    mine = fit(module, ITEMS, precision)
    formats.on_fit_start(mine, module)
    mine.test(module, loader(ITEMS), verbose=False)
    assert formats.found["net.0"][1] == torch.bfloat16
    assert formats.found["net.4"][1] == torch.float32
    assert not any("forward" in vars(each) for each in module.modules())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"kind": "fp16"}, "kind must be one of bf16_mixed, fp16_mixed"),
        ({"kind": "16-true"}, "kind must be one of"),
        ({"keep_fp32": "LayerNorm"}, "keep_fp32 must be a list"),
        ({"keep_fp32": [nn.LayerNorm]}, "keep_fp32 must be a list of names, as texts"),
        ({"keep_fp32": [""]}, "keep_fp32 must be a list"),
        ({"kind": "tf32", "keep_fp32": ["net"]}, "has no effect with tf32"),
        ({"init_scale": 2.0}, "has no effect with bf16_mixed"),
        ({"kind": "fp16_mixed", "init_scale": 0.0}, "init_scale must be finite and > 0"),
        ({"kind": "fp16_mixed", "min_scale": float("nan")}, "min_scale must be finite"),
        ({"kind": "fp16_mixed", "min_scale": 2.0**20}, "min_scale must be at most init_scale"),
        ({"kind": "fp16_mixed", "fall_back": "fp64"}, "fall_back must be"),
        ({"kind": "fp16_mixed", "cool_down": 7}, "cool_down=7 has no effect without fall_back"),
        ({"kind": "fp16_mixed", "fall_back": "bf16", "cool_down": 0}, "cool_down must be"),
        ({"kind": "fp8", "emulate": True, "fp8_recipe": "rowwise_with_gw_hp"}, "fp8_recipe must be"),
        ({"report_every": 0}, "report_every must be"),
        ({"report_every": "5"}, "report_every must be a whole number"),
        ({"kind": "fp16_mixed", "growth_interval": float("inf")}, "growth_interval must be a whole number"),
        ({"kind": "fp16_mixed", "init_scale": "a"}, "init_scale must be finite"),
    ],
)
def test_wrong_arguments_are_one_message(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        SetPrecision(**arguments)


# ---- the loss scale -------------------------------------------------------------------------------------------------


class Large(Net):
    """The loss of batches from ``first`` on is so large that fp16 overflows at any scale above 1."""

    def __init__(self, first: int = 4) -> None:
        super().__init__(norm=False)
        self.first, self.formats = first, list[torch.dtype]()

    def training_step(self, batch: tuple[Tensor, int], batch_idx: int) -> Tensor:
        output = self.net(batch[0])
        self.formats.append(output.dtype)
        factor = 300.0 if batch_idx >= self.first else 1.0
        return (output * factor).float().square().mean()


def test_the_loss_scale_has_a_floor() -> None:
    """Bug: a scale of 1e-30, with which all gradients are zero."""
    events = EventRecorder()
    precision = SetPrecision("fp16_mixed", init_scale=2.0**20, min_scale=2.0**18)
    mine = fit(Large(0), ITEMS, precision, events)
    assert mine.precision_plugin.scaler.get_scale() == 2.0**18
    assert mine.callback_metrics["stability/loss_scale"] == 2.0**18
    assert precision.report().overflow_share == 1.0
    assert {event.reason for event in events.events} == {"fp16 overflow: the loss scale stays at its floor of 262144"}


@pytest.mark.parametrize(("fall_back", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_after_the_scale_fell_the_forward_pass_is_in_another_format_for_a_while(fall_back: Any, dtype: Any) -> None:
    """Bugs: steps are scaled while they need not be; the fall-back never ends, or is not told."""
    module, events = Large(0), EventRecorder()
    precision = SetPrecision("fp16_mixed", init_scale=2.0**20, min_scale=2.0**19, fall_back=fall_back, cool_down=3)
    mine = fit(module, ITEMS, precision, events)
    half = torch.float16
    assert module.formats == ([half] * 2 + [dtype] * 3) * 2 + [half] * 2
    assert mine.global_step == 6
    fell, back = f"computed in {fall_back}", "at a loss scale of 1.04858e+06"
    expected = [fell, back, fell, back, fell]
    assert [event.reason[-len(end) :] for event, end in zip(events.events, expected, strict=True)] == expected


def test_a_resume_within_a_fall_back_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    """Bug: the resumed run computes in fp16 again, or at another scale."""

    def train(*callbacks: Callback, **options: Any) -> Any:
        precision = SetPrecision("fp16_mixed", init_scale=2.0**20, min_scale=2.0**19, fall_back="bf16", cool_down=4)
        module = Large(0)
        mine = fit(module, [ITEMS[0]] * 9, precision, *callbacks, **options)
        return {**everything(mine), "left": torch.tensor(precision._left)}, module.formats

    cuts = [SaveAfter(cut, tmp_path / f"{cut}.ckpt") for cut in range(8)]
    whole, formats = train(*cuts)
    for cut in cuts:
        rest, found = train(ckpt_path=cut.path)
        assert_same(whole, rest)
        assert found == formats[cut.batch + 1 :]


def test_a_module_with_two_optimizers_has_no_fall_back() -> None:
    """Bug: gradients that were scaled by 65536 are unscaled by 1, since another optimizer has fallen back."""
    with pytest.raises(UserError, match="the module has 2 optimizers"):
        fit(gan.Gan(), gan.batches([""] * 4), SetPrecision("fp16_mixed", fall_back="bf16"))
    precision = SetPrecision("fp16_mixed", init_scale=256.0, keep_fp32=["BatchNorm1d"])
    done = fit(gan.Gan(), gan.batches([""] * 4), precision)
    assert done.callback_metrics["stability/loss_scale"] == 256.0


# ---- the report -----------------------------------------------------------------------------------------------------


def test_the_report_names_layers_whose_gradients_underflow(caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: the samples are taken at another scale than the gradients; a layer has another one's share."""

    class Tiny(Net):
        def training_step(self, batch: tuple[Tensor, int], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * 1e-6

    shares = []
    with caplog.at_level(logging.INFO, "stabletrain"):
        for scale in (1.0, 2.0**16):
            precision = SetPrecision("fp16_mixed", init_scale=scale, report_every=1)
            fit(Tiny(), ITEMS, precision)
            shares.append({layer: each.underflow for layer, each in precision.report().underflow.items()})
    assert shares[0].keys() == {"net.0", "net.1", "net.4"}
    assert min(shares[0].values()) > 0.9
    assert max(shares[1].values()) < 0.7
    assert "steps dropped: 0.00% by plugins, 0.00% by the loss scaler, about 0.0 MiB" in caplog.text
    assert "net.0  underflow" in caplog.text


def test_the_memory_saved_is_that_of_outputs_less_copies_of_weights() -> None:
    """Bug: parameters of bf16_true count as activations; a copy of a weight counts as a saving."""
    precision = SetPrecision()
    fit(Net(norm=False), ITEMS, precision)
    outputs = 8 * (16 + 16 + 16 + 16 + 1) * 2  # linear, identity, tanh, dropout, linear; 2 bytes each
    assert precision.report().of_activations == outputs - 2 * (6 * 16 + 16)
    assert precision.report().of_parameters == 0
    precision = SetPrecision("bf16_true", allow_stalling=True)
    fit(Half(), ITEMS, precision)
    assert precision.report().of_parameters == 4 * (6 * 16 + 16 + 32 + 16 + 1)


def test_checkpoints_are_those_of_lightnings_own_precision(tmp_path: Path) -> None:
    """Bug: the loss scale starts anew when a script goes over to the plugin, or back."""
    fit(Net(), ITEMS, SaveAfter(11, tmp_path / "lightning.ckpt"), fp16=True)
    mine = SetPrecision("fp16_mixed", init_scale=4.0)
    with pytest.warns(UserWarning, match="holds no state of set_precision"):
        resumed = fit(Net(), ITEMS, mine, ckpt_path=tmp_path / "lightning.ckpt")
    scale = torch.load(tmp_path / "lightning.ckpt", weights_only=True)["MixedPrecision"]["scale"]
    assert scale > 1024.0
    assert resumed.precision_plugin.scaler.get_scale() == scale
    fit(Net(), ITEMS, SetPrecision("fp16_mixed", init_scale=8.0), SaveAfter(11, tmp_path / "mine.ckpt"))
    back = fit(Net(), ITEMS, ckpt_path=tmp_path / "mine.ckpt", fp16=True)
    assert back.precision_plugin.scaler.get_scale() == 8.0
