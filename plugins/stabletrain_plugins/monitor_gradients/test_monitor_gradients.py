import inspect
import math
from pathlib import Path
from typing import Any

import fits
import pytest
import torch
import torch.distributed as dist
import yaml
from fits import HEALTHY, NAN_LOSS, EventRecorder, assert_same, batches
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from stabletrain.core.layer_names import layer_names
from stabletrain.errors import UserError
from stabletrain.runtime import gradients
from stabletrain.runtime.guard.callbacks import as_callback
from stabletrain.runtime.guard.options import Guard
from stabletrain_plugins.clip_norm.rule import ClipNormRule
from stabletrain_plugins.monitor_gradients import callback
from stabletrain_plugins.monitor_gradients.callback import MonitorGradients
from stabletrain_plugins.monitor_gradients.tensor_readings import SpectralNorms, UpdateRatios
from stabletrain_plugins.skip_nonfinite.rule import SkipNonFiniteRule

CONF = Path(__file__).parent / "conf" / "plugins" / "gradients" / "monitor.yaml"
LAYERS = ("net.inp", "net.blocks.0", "net.blocks.1", "net.out", "net.scale")
ClipNorm, SkipNonFinite = as_callback(ClipNormRule), as_callback(SkipNonFiniteRule)
GRAD_NORM = "stability_layers/grad_norm/"


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])
        self.out = nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.scale * self.out(x)
        return out


class Net(fits.Net):
    """Records the true gradient norms; at some steps a block's gradient becomes non-finite on its way back."""

    def __init__(self, poison: dict[int, float] | None = None, fused: bool = False) -> None:
        super().__init__("adamw-fused" if fused else "adamw-foreach")
        self.net = Stack()
        self.poison = poison or {}
        self.true: list[dict[str, float]] = []
        self.net.blocks[1][0].bias.register_hook(self._poisoned)

    def _poisoned(self, grad: Tensor) -> Tensor | None:
        value = self.poison.get(len(self.true))
        return None if value is None else torch.full_like(grad, value)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        prefixes = {layer: f"{layer}." for layer in LAYERS[:-1]} | {"net.scale": "net.scale"}
        self.true.append(
            {
                layer: math.sqrt(
                    sum(
                        p.grad.double().square().sum().item()
                        for name, p in self.named_parameters()
                        if name.startswith(prefix) and p.grad is not None
                    )
                )
                for layer, prefix in prefixes.items()
            }
        )


class Record(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name = "record"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def fit(
    module: Net, folder: Path, *callbacks: Callback, steps: int = 20, nan_at: int | None = None, **options: Any
) -> tuple[Trainer, Record]:
    record = Record()
    items = batches(*(NAN_LOSS if step == nan_at else HEALTHY for step in range(steps)))
    arguments: dict[str, Any] = {"logger": record, "log_every_n_steps": 10, "limit_val_batches": 0}
    arguments |= {"default_root_dir": folder, **options}
    return fits.fit(module, items, *callbacks, val_items=items, **arguments), record


def mean(values: list[float]) -> Any:
    return pytest.approx(sum(values) / len(values), rel=1e-6)


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_norms_of_layers_are_means_since_the_last_flush(tmp_path: Path, mode: Any) -> None:
    """Bugs: means over other steps; gradients of after the step; a parameter counted in a layer with a similar name."""
    module = Net(fused=True)
    _, record = fit(module, tmp_path, Guard(mode=mode), MonitorGradients(every=5))
    rows = [row for _, row in record.rows if "stability/grad_norm" in row]
    assert len(rows) == 2
    for layer in LAYERS:
        assert rows[1][f"{GRAD_NORM}{layer}"] == mean([module.true[step][layer] for step in (14, 19)])
        if mode == "exact":
            assert rows[0][f"{GRAD_NORM}{layer}"] == mean([module.true[step][layer] for step in (0, 4, 9)])
    assert rows[1]["stability/nonfinite_layers"] == rows[1][f"{GRAD_NORM}net.unused"] == 0
    assert {key for key in rows[1] if key.startswith("stability_layers/weight_norm/")} == {
        f"stability_layers/weight_norm/{layer}" for layer in (*LAYERS, "net.unused")
    }


def test_weights_are_those_that_the_step_began_with(tmp_path: Path) -> None:
    """Bug: weights measured after the step; norms of weights logged although ``weights=False``."""
    module = Net()
    before = module.net.out.weight.detach().norm().hypot(module.net.out.bias.detach().norm()).item()
    _, record = fit(module, tmp_path, MonitorGradients(), steps=1, log_every_n_steps=1)
    assert record.rows[0][1]["stability_layers/weight_norm/net.out"] == pytest.approx(before, rel=1e-6)
    _, record = fit(Net(), tmp_path, MonitorGradients(weights=False), steps=1, log_every_n_steps=1)
    assert not [key for key in record.rows[0][1] if "weight_norm" in key]


def test_gradients_are_seen_before_clipping_and_make_up_the_global_norm(tmp_path: Path) -> None:
    """Bug: norms of clipped gradients, or a parameter that belongs to no layer."""
    monitor = MonitorGradients(every=1)
    _, record = fit(Net(), tmp_path, ClipNorm(max_norm=1e-3), monitor, steps=1, log_every_n_steps=1)
    row = record.rows[0][1]
    assert row["stability/clipped_share"] == 1.0
    norms = [value for key, value in row.items() if key.startswith(GRAD_NORM)]
    assert math.hypot(*norms) == pytest.approx(row["stability/grad_norm"], rel=1e-6)
    assert row["stability/grad_norm"] > 0.1


@pytest.mark.parametrize("plugins", [[], [ClipNorm(0.5), SkipNonFinite()]], ids=["alone", "beside rules"])
def test_training_is_bit_identical_with_it(tmp_path: Path, plugins: list[Callback]) -> None:
    """Bug: measuring changes a gradient or draws random numbers."""
    with_it, without = Net(), Net()
    fit(with_it, tmp_path, *plugins, MonitorGradients(every=1, depth=None), log_every_n_steps=1)
    fit(without, tmp_path, *plugins)
    assert_same(with_it.state_dict(), without.state_dict())


def test_steps_without_measurement_cost_nothing_and_the_device_is_read_once_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: norms computed at every step, or the host waits for the device at every measurement."""
    measured, read = [], []
    tensor_norms, to_list = gradients.tensor_norms, Tensor.tolist

    class Counted:
        of = staticmethod(gradients.of)

        @staticmethod
        def tensor_norms(tensors: Any) -> Tensor:
            measured.append(len(tensors))
            return tensor_norms(tensors)

    def counted_list(tensor: Tensor) -> Any:
        if tensor.dtype == torch.float64 and tensor.ndim:
            read.append(tensor.numel())
        return to_list(tensor)

    monkeypatch.setattr(callback, "gradients", Counted)
    monkeypatch.setattr(Tensor, "tolist", counted_list)
    fit(Net(), tmp_path, MonitorGradients(every=4))
    assert len(measured) == 2 * len([0, 3, 7, 11, 15, 19])
    assert len(read) == 2
    assert read[0] == read[1]


def test_other_callbacks_can_monitor_a_layer(tmp_path: Path) -> None:
    # self.log would not reach ModelCheckpoint from a callback that logs at a flush
    best = ModelCheckpoint(tmp_path, monitor=f"{GRAD_NORM}net.out", save_on_train_epoch_end=False)
    trainer, _ = fit(Net(), tmp_path, MonitorGradients(every=5), best, limit_val_batches=1, steps=10)
    names = {f"{GRAD_NORM}net.blocks.0", "stability_layers/weight_norm/net.out"}
    assert names | {"stability/nonfinite_layers"} <= set(trainer.callback_metrics)
    assert best.best_model_score == trainer.callback_metrics[f"{GRAD_NORM}net.out"]
    checkpoint = torch.load(best.best_model_path, weights_only=True)
    assert checkpoint["callbacks"]["monitor_gradients"]["counters"]["attempted"] == 10


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_parameter_whose_gradient_became_nonfinite_is_named(tmp_path: Path, value: float) -> None:
    """Bug: an event names the wrong parameter, or none, since step 7 is not among the measured ones."""
    recorder = EventRecorder()
    module = Net(poison={7: value})
    _, record = fit(module, tmp_path, MonitorGradients(every=50), SkipNonFinite(), recorder)
    (event,) = [event for event in recorder.events if event.plugin == "monitor_gradients"]
    assert (event.step, event.kind, event.value) == (7, "nonfinite", 1.0)
    assert event.reason.endswith("non-finite in 1 of 9 parameters: net.blocks.1.0.bias")
    assert [row["stability/nonfinite_layers"] for _, row in record.rows if "stability/nonfinite_layers" in row] == [1.0]


def test_a_nonfinite_loss_makes_all_gradients_nonfinite_and_names_the_first(tmp_path: Path) -> None:
    """Bug: an event with all names of a large model, or with the wrong first one."""
    recorder = EventRecorder()
    fit(Net(), tmp_path, MonitorGradients(), SkipNonFinite(), recorder, nan_at=5)
    (event,) = [event for event in recorder.events if event.plugin == "monitor_gradients"]
    assert "loss nan, gradient non-finite in 9 of 9 parameters, from net.scale to net.out.bias" in event.reason


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_a_nonfinite_layer_is_counted_and_enters_no_mean(tmp_path: Path, mode: Any) -> None:
    """Bug: one infinite norm makes a layer's mean infinite, or one step without it is lost for all layers."""
    module = Net(poison={14: math.inf}, fused=True)
    _, record = fit(module, tmp_path, Guard(mode=mode), MonitorGradients(every=5), SkipNonFinite())
    first, second = (row for _, row in record.rows if "stability/grad_norm" in row)
    assert (first["stability/nonfinite_layers"], second["stability/nonfinite_layers"]) == (0.0, 1.0)
    assert second[f"{GRAD_NORM}net.blocks.1"] == mean([module.true[19]["net.blocks.1"]])
    assert second[f"{GRAD_NORM}net.blocks.0"] == mean([module.true[step]["net.blocks.0"] for step in (14, 19)])


def test_a_layer_that_is_never_finite_is_omitted_and_counted(tmp_path: Path) -> None:
    """Bug: a mean of nothing is logged as NaN or 0."""
    module = Net(poison=dict.fromkeys(range(4), math.nan))
    skip = SkipNonFinite(max_in_a_row=100)
    _, record = fit(module, tmp_path, MonitorGradients(every=1), skip, steps=4, log_every_n_steps=4)
    row = record.rows[-1][1]
    assert row["stability/nonfinite_layers"] == 1
    assert f"{GRAD_NORM}net.blocks.1" not in row
    assert f"{GRAD_NORM}net.out" in row


def test_a_second_fit_starts_without_measurements(tmp_path: Path) -> None:
    """Bug: norms of the first fit in the means of the second."""
    monitor = MonitorGradients(every=5)
    fit(Net(), tmp_path, monitor, steps=7, log_every_n_steps=7)
    module = Net()
    _, record = fit(module, tmp_path, monitor, steps=3, log_every_n_steps=3)
    assert record.rows[-1][1][f"{GRAD_NORM}net.out"] == mean([module.true[0]["net.out"]])


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (1, ["m.wte", "m.blocks.0", "m.blocks.0", "m.blocks.1", "m.scale"]),
        (2, ["m.wte", "m.blocks.0.mlp.0", "m.blocks.0.attn", "m.blocks.1.mlp", "m.scale"]),
        (None, ["m.wte", "m.blocks.0.mlp.0", "m.blocks.0.attn", "m.blocks.1.mlp.up", "m.scale"]),
    ],
)
def test_layers_are_modules_at_a_depth(depth: int | None, layers: list[str]) -> None:
    """Bug: names with the prefixes of wrappers; blocks joined into one layer or split too far."""
    names = ["wte.weight", "blocks.0.mlp.0.bias", "blocks.0._orig_mod.attn.weight", "blocks.1.mlp.up.bias", "scale"]
    assert layer_names([f"m.{name}" for name in names], depth) == layers


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (["weight", "bias"], ["weight", "bias"]),
        (["lin.weight", "lin.bias"], ["lin", "lin"]),
        (["net.0.weight", "net.2.weight"], ["net.0", "net.2"]),
        (["0.weight", "1.weight"], ["0", "1"]),
        ([], []),
    ],
)
def test_layers_of_small_models(names: list[str], layers: list[str]) -> None:
    """Bug: an empty name, or one layer for the whole model."""
    assert layer_names(names, 1) == layers


def test_a_large_norm_is_no_overflow() -> None:
    """Bug: the squares of norms overflow in float32, and a finite layer counts as non-finite."""
    monitor = MonitorGradients()
    monitor._layers = ["a"]
    norms = monitor._norms(0, [torch.full((2,), 1e19), torch.full((2,), 1e19)], [0, 0], torch.device("cpu"))
    assert norms.item() == pytest.approx(2e19, rel=1e-6)


def test_sharded_and_sparse_gradients_have_the_norm_of_the_whole(tmp_path: Path) -> None:
    """Bug: the norm of the local shard, or of the entries of a sparse gradient before they are added."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        full = torch.arange(6.0).reshape(3, 2)
        sparse = torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.ones(2, 2), (3, 2), check_invariants=True)
        monitor = MonitorGradients()
        monitor._layers = ["sharded", "sparse"]
        tensors = [distribute_tensor(full, mesh, [Shard(0)]), sparse]
        norms = monitor._norms(0, tensors, [0, 1], torch.device("cpu"))
        assert norms.tolist() == pytest.approx([full.norm().item(), math.sqrt(8)])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("arguments", [{"every": 0}, {"depth": 0}])
def test_a_wrong_argument_is_named(arguments: dict[str, Any]) -> None:
    """Bug: ``every=0`` divides by zero in the middle of a run."""
    with pytest.raises(UserError, match=rf"MonitorGradients\({next(iter(arguments))}="):
        MonitorGradients(**arguments)


def test_the_option_file_says_the_defaults() -> None:
    """Bug: the config has other defaults than the callback."""
    node = yaml.safe_load(CONF.read_text())
    assert node.pop("_target_") == "stabletrain.MonitorGradients"
    assert node == {key: p.default for key, p in inspect.signature(MonitorGradients).parameters.items()}


class Moves(Callback):
    """Records the weights before and after each step of the optimizer."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.after.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_the_update_ratio_is_that_of_what_the_step_changed(tmp_path: Path, mode: Any) -> None:
    """Bugs: a dropped step has a ratio; changes that a callback makes after the step count; biases, which begin with 0,
    hide the matrices of their layer; copies of the weights are kept."""

    class Changes(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            with torch.no_grad():
                pl_module.net.out.weight.mul_(1.5)

    moves, monitor = Moves(), MonitorGradients(every=1, depth=None, update_ratio=True)
    callbacks = [Guard(mode=mode), monitor, SkipNonFinite(), moves, Changes()]
    _, record = fit(Net(fused=True), tmp_path, *callbacks, steps=4, nan_at=2, log_every_n_steps=4)
    rows = [row for _, row in record.rows if "stability/update_ratio" in row]
    expected: dict[str, list[float]] = {}
    for step in (0, 1, 3):
        before, after = moves.before[step], moves.after[step]
        for name in ("net.inp", "net.out", "net.blocks.0.0"):
            weight = before[f"{name}.weight"]
            expected.setdefault(name, []).append(float((after[f"{name}.weight"] - weight).norm() / weight.norm()))
        trained = [name for name in before if "unused" not in name]
        changes = [(after[name] - before[name]).norm() for name in trained]
        whole = torch.stack(changes).norm() / torch.stack([before[name].norm() for name in trained]).norm()
        expected.setdefault("", []).append(float(whole))
    assert rows[-1]["stability/update_ratio"] == mean(expected.pop(""))
    for name, values in expected.items():
        assert rows[-1][f"stability_layers/update_ratio/{name}"] == mean(values)
    assert "stability_layers/update_ratio/net.scale" not in rows[-1]
    assert monitor._ratios is None


def test_rms_t_is_that_of_the_second_moment_that_the_step_makes(tmp_path: Path) -> None:
    """Bugs: the moment before the step, or without its bias correction; rows never seen make it infinite."""
    seen: list[dict[str, float]] = []

    class Embedded(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net.unused = nn.Embedding(4, 3)  # type: ignore[assignment]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss + self.net.unused(torch.tensor([batch_idx % 2])).square().sum()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            super().on_before_optimizer_step(optimizer)
            self.grads = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}
            self.had = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in self.named_parameters()
                        if "exp_avg_sq" in optimizer.state[p]}  # fmt: skip

        def on_train_batch_end(self, *_: Any) -> None:
            optimizer = self.optimizers().optimizer  # type: ignore[union-attr]
            found = {}
            for name, p in self.named_parameters():
                if name in self.grads and name in self.had:
                    own, known = optimizer.state[p], self.had[name] > 0
                    moment = own["exp_avg_sq"] / (1 - 0.999 ** float(own["step"]))
                    found[name] = float((self.grads[name].square() / moment)[known].mean().sqrt())
            seen.append(found)

    _, record = fit(Embedded(), tmp_path, MonitorGradients(every=1, rms_t=True), steps=3, log_every_n_steps=1)
    rows = [row for _, row in record.rows if "stability/loss" in row]
    assert not [key for key in rows[0] if "rms_t" in key]  # no second moment yet
    for row, expected in zip(rows[1:], seen[1:], strict=True):
        for layer in ("net.inp", "net.out", "net.unused"):
            largest = max(value for name, value in expected.items() if name.startswith(f"{layer}."))
            assert row[f"stability_layers/rms_t/{layer}"] == pytest.approx(largest, rel=1e-4)


def test_the_spectral_norm_converges_and_recovers() -> None:
    """Bugs: a matrix that was 0 or NaN for a while is so for ever; another singular value than the largest."""
    torch.manual_seed(0)
    p, spectral = nn.Parameter(torch.randn(6, 4)), SpectralNorms()
    true = float(torch.linalg.matrix_norm(p.detach(), 2))
    assert float(spectral.of([nn.Parameter(torch.ones(3)), p])[1]) == pytest.approx(true, rel=1e-2)
    weights = p.detach().clone()
    for bad in (0.0, math.nan):
        with torch.no_grad():
            p.fill_(bad)
        assert not float(spectral.of([p])[0]) > 0
        with torch.no_grad():
            p.copy_(weights)
        for _ in range(20):
            last = float(spectral.of([p])[0])
        assert last == pytest.approx(true, rel=1e-4)


def test_a_limit_of_the_gradient_norm_is_an_event(tmp_path: Path) -> None:
    """Bugs: no event, or one for a reading below its limit; a limit of a reading that is not made."""
    recorder = EventRecorder()
    monitor = MonitorGradients(every=2, warn_above={"grad_norm": 1e-6, "weight_norm": 1e6})
    fit(Net(), tmp_path, monitor, recorder, steps=4, log_every_n_steps=4)
    assert [(event.kind, event.step, event.reason.split()[0]) for event in recorder.events] == [
        ("warning", 3, "grad_norm")
    ]
    with pytest.raises(UserError, match="used with update_ratio=true"):
        MonitorGradients(warn_above={"update_ratio": 0.1})


class CountsByGroup(torch.optim.AdamW):
    """Adam's state, with the number of steps in the group, as in some packages."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p]:
                    self.state[p]["step"] = torch.tensor(float(group["step"]))
        result = super().step(closure)
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                self.state[p].pop("step", None)
        return result


def test_readings_of_tensors_do_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Bugs: the state of another optimizer than torch's Adam raises; no memory for a copy of the weights ends the run,
    before the step or in the hook after it."""

    class Counts(Net):
        def configure_optimizers(self) -> Any:
            return CountsByGroup(self.parameters(), 0.01)

    _, record = fit(Counts(), tmp_path, MonitorGradients(every=1, rms_t=True), steps=3, log_every_n_steps=1)
    assert any("stability_layers/rms_t/net.out" in row for _, row in record.rows)
    assert "no more are made" not in caplog.text

    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    for name in ("__init__", "_compare"):
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(UpdateRatios, name, fails)
            _, record = fit(Net(), tmp_path, MonitorGradients(every=1, update_ratio=True), steps=3, log_every_n_steps=3)
        assert caplog.text.count("no more are made") == 1
        assert any("stability_layers/grad_norm/net.out" in row for _, row in record.rows)


@pytest.mark.parametrize("arguments", [{"every": "5"}, {"every": 1.5}, {"depth": "a"}, {"update_ratio": "yes"}])
def test_an_argument_of_another_type_is_named(arguments: dict[str, Any]) -> None:
    """Bug: a TypeError with a traceback; a text that counts as true."""
    with pytest.raises(UserError, match=rf"monitor_gradients: {next(iter(arguments))} must be"):
        MonitorGradients(**arguments)


def test_spectral_norms_of_complex_matrices_are_left_out() -> None:
    """Bug: the imaginary part is dropped, with a warning."""
    assert SpectralNorms().of([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))]) == {}
