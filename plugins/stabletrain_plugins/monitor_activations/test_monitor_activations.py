"""Readings by hand, trainings that do not change, and nothing that stays open."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from counted_operations import counts
from fits import HEALTHY, EventRecorder, Net, SaveAfter, assert_same, batches, everything, fit
from lightning.pytorch import Callback, LightningModule
from observed import CASES, Case, Encoder, Small, tokens, train
from observed_on_ranks import readings
from rank_pool import on_ranks
from torch import Tensor, nn

from stabletrain import MonitorActivations, MonitorGradients, SkipNonFinite, UserError
from stabletrain.runtime.internals import modes
from stabletrain_plugins.monitor_activations import look

LAYERS = "stability_layers/"


def everything_on(every: int = 1) -> list[Callback]:
    gradients = MonitorGradients(every, None, update_ratio=True, rms_t=True, spectral_norm=True)
    return [MonitorActivations(every, None, "exact"), gradients]


def found(metrics: dict[str, Any], reading: str) -> dict[str, float]:
    start = f"{LAYERS}{reading}/"
    return {name.removeprefix(start): float(value) for name, value in metrics.items() if name.startswith(start)}


@pytest.mark.parametrize("name", CASES)
def test_no_bit_changes_and_every_call_is_seen(name: str) -> None:
    """Bugs: a reading draws random numbers, or changes a buffer or a gradient; attention inside
    nn.MultiheadAttention is not seen; what checkpointing computes again counts as further calls."""
    case = CASES[name]
    with_them = train(case, *everything_on())
    assert_same(everything(with_them), everything(train(case)))
    metrics = dict(with_them.callback_metrics)
    attends = {"lstm": [], "digits_cnn": []}.get(name)
    if attends is None:
        layers = "layers.{}.self_attn" if "encoder" in name else "net.blocks.{}.attention"
        attends = [layers.format(i) for i in range(2)]
    assert list(found(metrics, "attention_bound")) == attends
    assert list(found(metrics, "attention_logit")) == [f"{layer}/{head}" for layer in attends for head in range(2)]
    for layer in attends:
        bound = found(metrics, "attention_bound")[layer]
        logits = [found(metrics, "attention_logit")[f"{layer}/{head}"] for head in range(2)]
        assert max(logits) <= bound * 1.001
    relus = {"lstm": {"training_step"}, "digits_cnn": {"net.2", "net.5", "net.9"}}
    assert found(metrics, "zeros").keys() == relus.get(name, {"layers.0", "layers.1"} if "encoder" in name else set())
    assert metrics["stability/nonfinite_outputs"] == 0
    assert 0 < metrics["stability/output_logz"] < 10
    assert 0 < metrics["stability/update_ratio"] < 1


class Parts(Small):
    """Outputs that are known: a block with a functional ReLU within it, and a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Doubled(), nn.Sequential(nn.Linear(2, 2), nn.Tanh()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch) * batch.abs().sum(), torch.tensor([0, 1]))


class Doubled(nn.Module):
    """Doubles what a ReLU has left."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x.relu() * self.scale
        return y


def test_readings_by_hand() -> None:
    """Bugs: the RMS of a block mixes its output with those within it; zeros of other outputs than a ReLU's count; a
    second micro-batch is read; means of roots instead of the root of the mean."""
    torch.manual_seed(0)
    module = Parts()
    first, second = torch.tensor([[3.0, -1.0], [0.0, 50.0]]), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    ignored = torch.full((2, 2), 1e6)
    with torch.no_grad():
        module.net[1][0].weight.fill_(1.0)
        module.net[1][0].bias.zero_()
    outputs = [module.net[0](x).detach() for x in (first, second)]
    optimizer = torch.optim.SGD(module.parameters(), 1e-9)
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    monitor = MonitorActivations(every=1)
    items = [first, ignored, second, ignored]
    metrics = dict(fit(module, items, monitor, accumulate_grad_batches=2, log_every_n_steps=2).callback_metrics)
    both = torch.cat(outputs)
    assert found(metrics, "activation_rms")["net.0"] == pytest.approx(both.square().mean().sqrt().item())
    assert found(metrics, "activation_max")["net.0"] == 100.0
    assert found(metrics, "zeros") == {"net.0": 4 / 8}  # 3 0 0 50; 1 1 0 0
    after = both.sum(1).tanh()
    assert found(metrics, "saturated") == {"net.1": float((after > 0.97).float().mean())}
    assert found(metrics, "activation_max")["net.1"] == 100.0  # its linear part
    pairs = zip(outputs, (first, second), strict=True)
    logits = [x.sum(1).tanh().view(2, 1).expand(2, 2) * batch.abs().sum() for x, batch in pairs]
    assert metrics["stability/output_logit"] == pytest.approx(max(x.abs().max().item() for x in logits))
    assert metrics["stability/output_logz"] == pytest.approx(torch.cat(logits).logsumexp(1).mean().item())


def count(case: Case, *plugins: Callback) -> list[tuple[int, int]]:
    return counts(lambda callbacks: train(case, *callbacks, log_every_n_steps=100), *plugins)


@pytest.mark.parametrize("name", ["char_gpt", "encoder", "digits_cnn"])
def test_other_steps_cost_no_operation_and_no_look_reads_the_device(name: str) -> None:
    """Bugs: a hook or a mode that stays open between looks; the host waits for a number in a look."""
    bare, looked = (count(CASES[name], *plugins) for plugins in ([MonitorGradients(every=100)], everything_on(3)))
    assert [reads for _, reads in bare] == [reads for _, reads in looked]
    assert bare[1] == looked[1]
    assert bare[2][0] < looked[2][0]


class Fails(Encoder):
    """Raises in a part of the model, or has no loss."""

    how = "raise"

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx == 1:
            self.embedding(batch)
            if self.how == "raise":
                return self.layers[0](torch.zeros(1))
            return None
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("how", ["raise", "no loss"])
def test_nothing_stays_open(how: str) -> None:
    """Bugs: after an exception, or a step without a loss, hooks, a mode or the stance of the compiler stay."""
    module = Fails()
    module.how = how
    monitor = MonitorActivations(every=1, attention="exact")
    if how == "raise":
        with pytest.raises((AssertionError, RuntimeError, IndexError)):
            fit(module, tokens(3), monitor)
    else:
        fit(module, tokens(3), monitor)
    assert modes.open_function_modes() == []
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_limit_is_an_event_and_nothing_else() -> None:
    """Bugs: a reading above its limit skips the step, or is not in an event; one below it is."""
    limits = {"activation_max": 1.0, "output_logit": 0.01, "attention_bound": 1e9}
    listener = EventRecorder()
    case = CASES["char_gpt"]
    mine = train(case, MonitorActivations(every=2, warn_above=limits), listener, log_every_n_steps=4)
    assert_same(everything(mine), everything(train(case)))
    events = {event.reason.split()[0]: event for event in listener.events}
    assert events.keys() == {"activation_max", "output_logit"}
    event = events["activation_max"]
    assert (event.kind, event.step, event.limit, event.plugin) == ("warning", 3, 1.0, "monitor_activations")
    assert event.value == max(found(dict(mine.callback_metrics), "activation_max").values())
    assert f"is {event.value:.4g}, above its limit 1" in event.reason


def test_a_layer_of_torch_that_is_only_evaluated_keeps_its_kernel(caplog: Any) -> None:
    """Bug: a frozen transformer layer is computed step by step while it is observed, with other bits."""

    class Frozen(Encoder):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.layers.requires_grad_(False)

        def on_train_start(self) -> None:
            self.layers.eval()  # Lightning warns of those that are before

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            with torch.no_grad():
                x = self.layers[0](torch.nn.functional.one_hot(batch[:, :-1] % 8, 8).float())
            return F.cross_entropy(self.head(x).flatten(0, 1), batch[:, 1:].flatten())

    case = Case(Frozen, tokens(4), {})
    with caplog.at_level(logging.INFO, "stabletrain"):
        mine = train(case, MonitorActivations(every=1))
    assert_same(everything(mine), everything(train(case)))
    assert "layers.0 is in evaluation mode" in caplog.text


def test_nonfinite_outputs_are_counted_and_enter_no_mean() -> None:
    """Bug: one NaN makes the mean of the steps since the last flush NaN."""

    class Spoilt(Parts):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch * math.nan if batch_idx == 1 else batch, batch_idx)

    items = [torch.ones(2, 2)] * 3
    plugins = (MonitorActivations(every=1, depth=None), SkipNonFinite())
    metrics = dict(fit(Spoilt(), items, *plugins, log_every_n_steps=3).callback_metrics)
    assert metrics["stability/nonfinite_outputs"] == 3  # net.0 and the parts of net.1
    assert all(math.isfinite(value) for value in metrics.values())


class Lazy(dict):  # type: ignore[type-arg]
    """A container that cannot be asked for its parts yet."""

    def values(self) -> Any:
        raise RuntimeError("not computed yet")


class Unusual(nn.Module):
    """Returns what is no tensor of numbers.

    Args:
        how: ``lazy``, ``mask``, ``itself`` or ``bits``.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        if self.how == "mask":
            return torch.full((2, 2), torch.finfo(x.dtype).min)
        if self.how == "bits":
            return x.to(torch.float8_e4m3fn)
        output: list[Any] = [Lazy(x=x)]
        return output[0] if self.how == "lazy" else output.append(output) or output


@pytest.mark.parametrize("how", ["lazy", "mask", "itself", "bits"])
def test_unusual_outputs_neither_end_the_run_nor_the_readings(how: str) -> None:
    """Bugs: a container's own exception ends the run; a large finite output counts as non-finite; tensors for which
    torch has no norm end all readings."""

    class With(Parts):
        def __init__(self) -> None:
            super().__init__()
            self.unusual = Unusual(how)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.unusual(batch)
            return super().training_step(batch, batch_idx)

    metrics = dict(fit(With(), [torch.ones(2, 2)] * 2, MonitorActivations(every=1)).callback_metrics)
    assert metrics["stability/nonfinite_outputs"] == 0
    assert "net.1" in found(metrics, "activation_rms")


def test_a_scripted_part_is_passed_over() -> None:
    """Bug: the dictionaries and hooks of a scripted module are not those of a module, and raise."""

    class With(Parts):
        def __init__(self) -> None:
            super().__init__()
            self.scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()))
            self.net[1].compile(backend="eager")

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(self.scripted(batch), batch_idx)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)
        metrics = dict(fit(With(), [torch.rand(2, 2)] * 2, MonitorActivations(every=1)).callback_metrics)
    assert "net.1" in found(metrics, "activation_rms")


def test_an_error_in_a_reading_ends_the_readings_only(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Bug: a tensor that cannot be read, or no memory for it, ends the run."""

    def fails(call: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(look.attention, "logit_bound", fails)
    case = CASES["char_gpt"]
    mine = train(case, MonitorActivations(every=1))
    assert_same(everything(mine), everything(train(case)))
    assert caplog.text.count("no more are made") == 1
    assert not found(dict(mine.callback_metrics), "activation_rms")


@pytest.mark.slow
def test_two_ranks_have_common_readings(tmp_path: Path) -> None:
    """Bugs: readings of one rank only; a rank that waits for another; weights that differ from a run without it."""
    (alone,) = on_ranks(readings, 1, tmp_path, None)
    for kind in ("ddp", "fsdp2"):
        (tmp_path / kind).mkdir()
        mine, theirs = on_ranks(readings, 2, tmp_path / kind, kind)
        assert mine.metrics == theirs.metrics
        assert found(mine.metrics, "activation_rms").keys() == {"net.0", "net.1", "net.2", "net.3"}
        assert_same(mine.weights, mine.bare)
        assert_same(mine.weights, theirs.weights)
        for name in alone.metrics:
            assert mine.metrics[name] == pytest.approx(alone.metrics[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_compiled_modules_are_seen_and_not_compiled_again() -> None:
    """Bugs: a hook that is traced raises; each look compiles the module again."""
    graphs = []

    def make() -> LightningModule:
        module = CASES["char_gpt"].make()
        module.net.compile(backend=backend)
        return module

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    case = CASES["char_gpt"]._replace(make=make)
    torch._dynamo.reset()
    bare = everything(train(case))
    number = len(graphs)
    torch._dynamo.reset()
    mine = train(case, MonitorActivations(every=2))
    assert len(graphs) == 2 * number
    assert_same(everything(mine), bare)
    assert list(found(dict(mine.callback_metrics), "attention_bound")) == ["net.blocks.0", "net.blocks.1"]
    torch._dynamo.reset()
    skipped = train(case, MonitorActivations(every=2, compiled="skip"))
    assert not found(dict(skipped.callback_metrics), "activation_rms")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"every": 0}, r"MonitorActivations\(every="),
        ({"attention": "all"}, "none, bound or exact"),
        ({"warn_above": {"atention_bound": 1.0}}, "did you mean 'attention_bound'"),
        ({"warn_above": {"zeros": math.nan}}, r"warn_above.*a number >= 0"),
        ({"warn_above": {"attention_logit": 1.0}}, "attention=exact"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], says: str) -> None:
    """Bug: a misspelt reading is never compared with its limit."""
    with pytest.raises(UserError, match=says):
        MonitorActivations(**arguments)


def test_a_resumed_run_looks_at_the_same_steps(tmp_path: Path) -> None:
    """Bugs: a resumed run looks at once, or never again."""

    class Looks(MonitorActivations):
        def metrics(self) -> dict[str, float]:
            looks.extend(step for step, _ in self._seen)
            return super().metrics()

    looks: list[int] = []
    items = batches(*[HEALTHY] * 8)
    whole = fit(Net(), items, Looks(every=3))
    assert looks == [0, 2, 5]
    looks.clear()
    fit(Net(), items, Looks(every=3), SaveAfter(3, tmp_path / "c.ckpt"), max_steps=4)
    resumed = fit(Net(), items, Looks(every=3), ckpt_path=tmp_path / "c.ckpt")
    assert looks == [0, 2, 5]
    assert resumed.global_step == whole.global_step
