"""Gradient and weight norms by layer, computed every N steps and copied to the host when metrics are logged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from stabletrain.core import metric_names
from stabletrain.core.events import Event
from stabletrain.core.layer_names import layer_names
from stabletrain.core.metric_names import MetricInfo
from stabletrain.core.outcome import Outcome
from stabletrain.errors import is_whole, require
from stabletrain.runtime import gradients
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.optimizer_buffers import parameters_of
from stabletrain.runtime.internals.state import state_holders
from stabletrain.runtime.observing.limits import check_limits, warnings_of
from stabletrain.runtime.observing.numbers import Stacked, read
from stabletrain.runtime.records.event_log import logger
from stabletrain_plugins.monitor_gradients.tensor_readings import SpectralNorms, UpdateRatios, rms_t

METRICS = (
    MetricInfo("stability/nonfinite_layers", "layers", "with a non-finite gradient, at most, in one step"),
    MetricInfo("stability_layers/grad_norm/<layer>", "L2", "norm of the layer's gradients, before any clipping"),
    MetricInfo("stability_layers/weight_norm/<layer>", "L2", "norm of the layer's weights, before the step"),
    MetricInfo("stability/update_ratio", "share", "norm of a step's change of all weights, of their norm before"),
    MetricInfo("stability_layers/update_ratio/<layer>", "share", "the same of a matrix; the largest in the layer"),
    MetricInfo("stability_layers/rms_t/<layer>", "ratio", "RMS_t of Adam; the largest of a tensor in the layer"),
    MetricInfo("stability_layers/spectral_norm/<layer>", "norm", "of a matrix; the largest in the layer"),
)

_READINGS = ("grad_norm", "weight_norm", "update_ratio", "rms_t", "spectral_norm")
"""The readings of layers."""
_SINGLE = _READINGS[2:]
"""Those of single tensors, of which a layer has the largest."""
_WHOLE = ""
"""The layer of what is read of all parameters together."""
Key = tuple[str, str]
"""A reading, and its layer."""


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
        update_ratio: also log how far a step moves the weights, relative to their norm: of all together, and of each
            tensor with two dimensions or more. It copies the weights during a measured step.
        rms_t: also log RMS_t of each tensor: the root of the mean of g^2 divided by Adam's second moment.
        spectral_norm: also log the largest singular value of each matrix.
        warn_above: limits by the name of a reading; a reading above its limit is an event of kind ``warning``. None: no
            limits.

    Raises:
        UserError: if an argument is out of range.

    >>> MonitorGradients(every=10, depth=None).every
    10
    """

    plugin: ClassVar[str] = "monitor_gradients"
    slot: ClassVar[str] = "gradients"
    per_optimizer = (
        *("_measurements", "_layers", "_layer_of", "_parameters", "_index", "_told"),
        *("_ratios", "_spectral", "_matrices"),
    )

    def __init__(
        self,
        every: int = 50,
        depth: int | None = 1,
        weights: bool = True,
        update_ratio: bool = False,
        rms_t: bool = False,
        spectral_norm: bool = False,
        warn_above: Mapping[str, float] | None = None,
    ) -> None:
        self._require(is_whole(every) and every >= 1, "every", "a whole number >= 1", every)
        self._require(depth is None or (is_whole(depth) and depth >= 1), "depth", "a whole number >= 1, or null", depth)
        switches = {"weights": weights, "update_ratio": update_ratio, "rms_t": rms_t, "spectral_norm": spectral_norm}
        for key, value in switches.items():
            self._require(isinstance(value, bool), key, "true or false", value)
        self.every = int(every)
        self.depth = None if depth is None else int(depth)
        self.weights = weights
        self.update_ratio = update_ratio
        self.rms_t = rms_t
        self.spectral_norm = spectral_norm
        self.warn_above = check_limits(warn_above, _READINGS, self._require)
        for name, limit in self.warn_above.items():
            option = {"grad_norm": "every", "weight_norm": "weights"}.get(name, name)
            self._require(bool(getattr(self, option)), f"warn_above.{name}", f"used with {option}=true", limit)
        self._clear()

    def _require(self, ok: bool, argument: str, expected: str, got: object) -> None:
        require(ok, self.plugin, argument, expected, got, f"plugins.{self.slot}", type(self).__name__)

    def _clear(self) -> None:
        self._worst: int | None = None
        self._measured = 0
        self._failed = False
        for _ in self.each_optimizer():
            self.start_optimizer()

    def start_optimizer(self) -> None:
        """No measurements of an optimizer's parameters yet."""
        self._measurements: list[Stacked[Key]] = []
        self._told = False
        self._layers: list[str] = []
        self._layer_of: list[int] = []
        self._parameters: list[Tensor] = []
        self._index: dict[int, tuple[list[int], Tensor]] = {}
        self._ratios: UpdateRatios | None = None
        self._spectral = SpectralNorms()
        self._matrices: list[str] = []

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
        self._measured = step
        norms = {"grad_norm": self._norms(0, grads, present, parameters[0].device)}
        if self.weights:
            weights = [p.detach() for p in parameters]
            norms["weight_norm"] = self._norms(1, weights, self._layer_of, parameters[0].device)
        keys = [(what, layer) for what in norms for layer in self._layers]
        self._measurements.append(Stacked(keys, list(norms.values())))
        if not self._failed and (self.update_ratio or self.rms_t or self.spectral_norm):
            with self._keeping_the_run():
                self._measure_tensors(parameters)

    @contextmanager
    def _keeping_the_run(self) -> Iterator[None]:
        """An error in it, such as no memory for a copy, ends the readings of single tensors, and not the training."""
        try:
            yield
        except Exception as error:
            if any(isinstance(p, DTensor) for p in self._parameters):
                raise  # other ranks wait in a collective
            self._failed = True
            self._drop_ratios()
            logger.warning("monitor_gradients: an error in a reading of tensors; no more are made", exc_info=error)

    def _measure_tensors(self, parameters: Sequence[Tensor]) -> None:
        """Compute the readings of single tensors; of what the step will change, begin."""
        assert self._guard is not None, "on_gradients is called by the guard"
        optimizer = self._guard.control.optimizer
        found: dict[str, dict[int, Tensor]] = {}
        if self.rms_t:
            found["rms_t"] = rms_t(state_holders(optimizer, self._guard.module), parameters)
        if self.spectral_norm:
            found["spectral_norm"] = self._spectral.of(parameters)
        for what, of in found.items():
            if of:
                keys = [(what, self._layers[self._layer_of[i]]) for i in of]
                self._measurements.append(Stacked(keys, [torch.stack(list(of.values()))]))
        if self.update_ratio:
            self._drop_ratios()
            moved = [i for i, p in enumerate(parameters) if p.grad is not None]
            self._matrices = [self._layers[self._layer_of[i]] if parameters[i].ndim > 1 else _WHOLE for i in moved]
            self._ratios = UpdateRatios(optimizer, [parameters[i] for i in moved]) if moved else None

    def _take_ratios(self) -> None:
        """The measured step has been applied: how far has it moved the weights?"""
        assert self._ratios is not None, "asked before"
        changes, norms = self._ratios.take()
        whole = torch.linalg.vector_norm(changes) / torch.linalg.vector_norm(norms)
        keys = [("update_ratio", layer) if layer else ("", "") for layer in self._matrices]
        self._measurements.append(Stacked([*keys, ("update_ratio", _WHOLE)], [changes / norms, whole.view(1)]))

    def _drop_ratios(self) -> None:
        ratios, self._ratios = self._ratios, None
        if ratios is not None:
            ratios.close()

    def on_outcome(self, outcome: Outcome) -> None:
        """After a non-finite step: name the parameters where its gradient is non-finite; of applied steps only once."""
        if self._ratios is not None:
            with self._keeping_the_run():
                if outcome.applied:
                    self._take_ratios()
            self._drop_ratios()
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
        layers: dict[str, dict[str, float]] = {}
        worst = [] if self._worst is None else [self._worst]
        self._worst = None
        for suffix in self.each_optimizer():
            measurements, self._measurements = self._measurements, []
            if measurements:
                count, means = _means(measurements)
                worst.append(count)
                for (what, layer), mean in means.items():
                    if layer == _WHOLE:
                        metrics[f"{what}{suffix}"] = mean
                    of = layers.setdefault(what, {})
                    # two optimizers may train parts of one layer
                    join = max if what in _SINGLE else math.hypot
                    of[layer] = join(of.get(layer, 0.0), mean)
        self._warn(layers)
        for what, of in layers.items():
            metrics |= {f"{metric_names.LAYERS}{what}/{layer}": mean for layer, mean in of.items() if layer != _WHOLE}
        return {"nonfinite_layers": float(max(worst)), **metrics} if worst else {}

    def _warn(self, layers: Mapping[str, Mapping[str, float]]) -> None:
        key = f"plugins.{self.slot}"
        for event in warnings_of(layers, self.warn_above, self._measured, self.plugin, key):
            assert self._guard is not None, "only a fit has measurements"
            self._guard.report(event)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop the copies of weights."""
        self._end()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop the copies of weights."""
        super().on_exception(trainer, pl_module, exception)
        self._end()

    def _end(self) -> None:
        for _ in self.each_optimizer():
            self._drop_ratios()

    def __getstate__(self) -> dict[str, Any]:
        """Exclude what was read in the running fit."""
        own = super().__getstate__()
        return {**own, "_ratios": None, "_spectral": SpectralNorms()}

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


def _means(measurements: list[Stacked[Key]]) -> tuple[int, dict[Key, float]]:
    """The largest number of layers with a non-finite gradient, and the means of the finite readings of each layer."""
    seen, found = 0, dict[Key, list[float]]()
    for step in read(measurements):
        seen = max(seen, sum(what == "grad_norm" and not math.isfinite(value) for (what, _), value in step))
        largest: dict[Key, float] = {}
        for key, value in step:
            if key[0] and math.isfinite(value):
                largest[key] = max(value, largest.get(key, value))  # of the tensors of a layer
        for key, value in largest.items():
            found.setdefault(key, []).append(value)
    return seen, {key: math.fsum(values) / len(values) for key, values in found.items()}
