"""Gradient and weight norms by layer, computed every N steps and copied to the host when metrics are logged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from stabletrain.core import metric_names
from stabletrain.core.events import Event
from stabletrain.core.metric_names import MetricInfo
from stabletrain.core.outcome import Outcome
from stabletrain.errors import require
from stabletrain.runtime import gradients
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.optimizer_buffers import parameters_of

METRICS = (
    MetricInfo("stability/nonfinite_layers", "layers", "with a non-finite gradient, at most, in one step"),
    MetricInfo("stability_layers/grad_norm/<layer>", "L2", "norm of the layer's gradients, before any clipping"),
    MetricInfo("stability_layers/weight_norm/<layer>", "L2", "norm of the layer's weights, before the step"),
)

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Name parts that torch.compile, FSDP and activation checkpointing insert."""


class MonitorGradients(GuardMember):
    """Log the norms of gradients and weights layer by layer, and report where a gradient became non-finite.

    In the first attempted step and every ``every`` steps the norms are computed on the device. They are copied to the
    host when the guard logs its metrics (``Trainer(log_every_n_steps=...)``): ``stability_layers/grad_norm/<layer>``
    and ``stability_layers/weight_norm/<layer>``, means over the measurements since then, and
    ``stability/nonfinite_layers``, the largest number of layers with a non-finite gradient in one step. Gradients are
    unscaled, before any transform or clipping. The guard itself logs ``stability/grad_norm`` of all parameters,
    ``stability/clipped_share`` and ``stability/skipped``, from every step.

    After a non-finite step an event names the parameters with a non-finite gradient. With decisions on the device
    (``Guard(mode="device")``) it does not: those gradients have been freed when the host gets the outcome.

    Args:
        every: attempted steps between measurements, >= 1.
        depth: levels of modules that make a layer, >= 1; an index counts with its list, so that 1 gives
            ``model.blocks.3``. None: every module is a layer.
        weights: also log the norms of the weights.

    Raises:
        UserError: if an argument is out of range.

    >>> MonitorGradients(every=10, depth=None).every
    10
    """

    plugin: ClassVar[str] = "monitor_gradients"
    slot: ClassVar[str] = "gradients"
    per_optimizer = ("_measurements", "_layers", "_layer_of", "_parameters", "_index", "_told")

    def __init__(self, every: int = 50, depth: int | None = 1, weights: bool = True) -> None:
        for key, value in (("every", every), ("depth", 1 if depth is None else depth)):
            require(value >= 1, self.plugin, key, ">= 1", value, f"plugins.{self.slot}", type(self).__name__)
        self.every = every
        self.depth = depth
        self.weights = weights
        self._clear()

    def _clear(self) -> None:
        self._worst: int | None = None
        for _ in self.each_optimizer():
            self.start_optimizer()

    def start_optimizer(self) -> None:
        """No measurements of an optimizer's parameters yet."""
        self._measurements: list[tuple[list[str], Tensor]] = []
        self._told = False
        self._layers: list[str] = []
        self._layer_of: list[int] = []
        self._parameters: list[Tensor] = []
        self._index: dict[int, tuple[list[int], Tensor]] = {}

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return self.plugin

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register with the guard, and discard all measurements."""
        if stage == "fit":
            self._clear()
        super().setup(trainer, pl_module, stage)

    def on_gradients(self, step: int, parameters: Sequence[Tensor]) -> None:
        """Compute the norms on the device, in the first step and every `every` steps."""
        if (step + 1) % self.every and step:
            return
        if [*map(id, parameters)] != [*map(id, self._parameters)]:  # at first, and when others are trained
            self._group(parameters)
        grads = gradients.of(parameters)
        present = [layer for layer, p in zip(self._layer_of, parameters, strict=True) if gradients.of((p,))]
        norms = [self._norms(0, grads, present, parameters[0].device)]
        if self.weights:
            norms.append(self._norms(1, [p.detach() for p in parameters], self._layer_of, parameters[0].device))
        self._measurements.append((self._layers, torch.stack(norms)))

    def on_outcome(self, outcome: Outcome) -> None:
        """After a non-finite step: name the parameters where its gradient is non-finite; of applied steps only once."""
        if outcome.overflow or (math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm)):
            return
        guard = self._guard
        if guard is None or guard.on_device:
            return
        parameters = list(guard.module.named_parameters())
        if not guard.module.automatic_optimization:  # other optimizers' gradients may be those of an earlier step
            mine = {id(p) for p in parameters_of(guard.control.optimizer)}
            parameters = [(name, p) for name, p in parameters if id(p) in mine]
        named = [(name, grad) for name, p in parameters for grad in gradients.of((p,))]
        if not named:
            return
        norms = gradients.tensor_norms([grad for _, grad in named]).tolist()
        names = [name for name, _ in named]
        layers = layer_names(names, self.depth)
        at = [i for i, norm in enumerate(norms) if not math.isfinite(norm)]
        bad = [names[i] for i in at]
        self._worst = max(self._worst or 0, len({layers[i] for i in at}))
        if outcome.applied and self._told:
            return  # the weights may be NaN, and all later gradients with them
        self._told = outcome.applied
        where = f", from {bad[0]} to {bad[-1]} in forward order" if len(bad) > 1 else f": {bad[0]}" if bad else ""
        reason = f"loss {outcome.loss:.4g}, gradient non-finite in {len(bad)} of {len(named)} parameters{where}"
        guard.report(Event(outcome.step, self.plugin, "nonfinite", float(len(bad)), 0.0, reason))

    def metrics(self) -> dict[str, float]:
        """Means over the measurements since the last call, copied from the device in one transfer."""
        metrics: dict[str, float] = {}
        worst = [] if self._worst is None else [self._worst]
        self._worst = None
        for _ in self.each_optimizer():
            measurements, self._measurements = self._measurements, []
            if measurements:
                count, means = _means(measurements)
                worst.append(count)
                for key, mean in means.items():  # two optimizers may train parts of one layer
                    metrics[key] = math.hypot(metrics.get(key, 0.0), mean)
        return {"nonfinite_layers": float(max(worst)), **metrics} if worst else {}

    def _group(self, parameters: Sequence[Tensor]) -> None:
        assert self._guard is not None, "on_gradients is called by the guard"
        order = {id(p): (i, name) for i, (name, p) in enumerate(self._guard.module.named_parameters())}
        named = [order.get(id(p), (len(order) + i, f"parameter {i}")) for i, p in enumerate(parameters)]
        layers = layer_names([name for _, name in named], self.depth)
        forward = sorted(zip(named, layers, strict=True))
        self._layers = list(dict.fromkeys(layer for _, layer in forward))
        at = {layer: i for i, layer in enumerate(self._layers)}
        self._layer_of = [at[layer] for layer in layers]
        self._parameters = list(parameters)

    def _norms(self, row: int, tensors: Sequence[Tensor], layer_of: list[int], device: torch.device) -> Tensor:
        """The norm of each layer, in float64, in which the square of a float32 does not overflow."""
        if not tensors:
            return torch.zeros(len(self._layers), dtype=torch.float64, device=device)
        squares = gradients.tensor_norms(tensors).double().square()
        known, index = self._index.get(row, ([], squares))
        if known != layer_of:
            index = torch.tensor(layer_of, device=squares.device)
            self._index[row] = (layer_of, index)
        return squares.new_zeros(len(self._layers)).index_add_(0, index, squares).sqrt()


def layer_names(parameters: Sequence[str], depth: int | None) -> list[str]:
    """The layer of each parameter: the beginning of its module's name.

    Levels that all modules share (``model.``) are part of the name but not counted, and an index counts with its list
    (``blocks.3`` is one level). A parameter of the common parent module itself is a layer by itself.

    Args:
        parameters: names as in `torch.nn.Module.named_parameters`.
        depth: levels of modules, >= 1; None: all of them.

    >>> layer_names(["model.wte.weight", "model.blocks.0.mlp.up.weight", "model.blocks.0.mlp.up.bias"], depth=1)
    ['model.wte', 'model.blocks.0', 'model.blocks.0']
    """
    names = [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in parameters]
    paths = [_levels(name) for name in names]
    same = [len(set(level)) == 1 for level in zip(*paths, strict=False)]
    shared = [*same, False].index(False)
    if all(len(path) == shared for path in paths):
        shared = max(0, shared - 1)  # one module alone: it is the layer
    end = None if depth is None else shared + depth
    return [".".join(path[:end]) if len(path) > shared else name for name, path in zip(names, paths, strict=True)]


def _means(measurements: list[tuple[list[str], Tensor]]) -> tuple[int, dict[str, float]]:
    """The largest number of non-finite layers, and the means of the finite norms of each layer."""
    values: list[float] = torch.cat([each.flatten() for _, each in measurements]).tolist()
    seen, found = 0, dict[str, list[float]]()
    for layers, norms in measurements:
        rows = [values[i : i + len(layers)] for i in range(0, norms.numel(), len(layers))]
        values = values[norms.numel() :]
        seen = max(seen, sum(not math.isfinite(norm) for norm in rows[0]))
        for what, row in zip(("grad_norm", "weight_norm"), rows, strict=False):
            for layer, norm in zip(layers, row, strict=True):
                if math.isfinite(norm):
                    found.setdefault(f"{metric_names.LAYERS}{what}/{layer}", []).append(norm)
    return seen, {key: math.fsum(norms) / len(norms) for key, norms in found.items()}


def _levels(parameter: str) -> list[str]:
    levels: list[str] = []
    before = ""
    for part in parameter.split(".")[:-1]:
        if part.isdigit() and levels and not before.isdigit():
            levels[-1] += f".{part}"
        else:
            levels.append(part)
        before = part
    return levels
