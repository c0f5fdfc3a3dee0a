"""The size of module outputs, attention logits and output logits by layer, in one step of many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from stabletrain.core import metric_names
from stabletrain.core.layer_names import ModuleLayers
from stabletrain.core.metric_names import MetricInfo
from stabletrain.errors import is_whole, require
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.internals.compiled import is_compiled
from stabletrain.runtime.observing.common import CommonReadings
from stabletrain.runtime.observing.limits import check_limits, warnings_of
from stabletrain.runtime.observing.numbers import Stacked, read
from stabletrain.runtime.observing.undisturbed import with_inference_kernel
from stabletrain.runtime.records.event_log import logger
from stabletrain_plugins.monitor_activations.look import Attention, Key, Look
from stabletrain_plugins.monitor_activations.summary import Readings, by_reading, values

METRICS = (
    MetricInfo("stability_layers/activation_rms/<layer>", "the output's", "root mean square of the layer's output"),
    MetricInfo("stability_layers/activation_max/<layer>", "the output's", "largest absolute value of an output in it"),
    MetricInfo("stability_layers/zeros/<layer>", "0 to 1", "share of zeros in the outputs of ReLU and the like"),
    MetricInfo("stability_layers/saturated/<layer>", "0 to 1", "share of outputs of sigmoid and tanh without slope"),
    MetricInfo("stability_layers/attention_bound/<layer>", "logit", "max|q| max|k| scale, which no logit exceeds"),
    MetricInfo(
        "stability_layers/attention_logit/<layer>/<head>", "logit", "largest of attention, with attention=exact"
    ),
    MetricInfo(
        "stability_layers/attention_entropy/<layer>/<head>",
        "nats",
        "mean of the attention weights, with attention=exact",
    ),
    MetricInfo("stability/output_logit", "logit", "largest absolute value of the logits at cross_entropy"),
    MetricInfo("stability/output_logz", "nats", "mean logsumexp of the logits at cross_entropy"),
    MetricInfo("stability/nonfinite_outputs", "modules", "with a non-finite output, at most, in one step"),
)
_OF_MODEL = ("output_logit", "output_logz", "nonfinite_outputs")
_WITH_LIMITS = (
    *("activation_rms", "activation_max", "zeros", "saturated", "attention_bound", "attention_logit"),
    *("output_logit", "output_logz"),
)


class MonitorActivations(GuardMember):
    """Log how large the outputs of modules, the logits of attention and those of the loss are, layer by layer.

    In the first attempted step and every ``every`` steps, the forward pass of the first micro-batch is observed: hooks
    and function modes are opened for it, and closed before its backward pass. The numbers are computed on the device,
    and read by the host when the guard logs its metrics (``Trainer(log_every_n_steps=...)``); of several ranks they are
    put together then. No bit of the training changes, but compiled modules run uncompiled in these steps.

    Args:
        every: attempted steps between looks, >= 1.
        depth: levels of modules that make a layer, as in ``MonitorGradients``, >= 1; None: every module is a layer.
        attention: ``"bound"``: a bound of the logits of each layer; ``"exact"``: also the largest logit and the entropy
            of each head, which computes the product of queries and keys once more; ``"none"``: nothing.
        logits: whether to read the logits at calls of ``F.cross_entropy``.
        compiled: what to do with a module that is compiled: ``"eager"``: run it as it was written in these steps;
            ``"skip"``: read nothing.
        warn_above: limits by the name of a reading; a reading above its limit is an event of kind ``warning``. None: no
            limits.

    Raises:
        UserError: if an argument is wrong.

    >>> MonitorActivations(every=10, warn_above={"attention_bound": 100}).warn_above
    {'attention_bound': 100.0}
    """

    plugin: ClassVar[str] = "monitor_activations"
    slot: ClassVar[str] = "outputs"

    def __init__(
        self,
        every: int = 50,
        depth: int | None = 1,
        attention: Attention = "bound",
        logits: bool = True,
        compiled: Literal["eager", "skip"] = "eager",
        warn_above: Mapping[str, float] | None = None,
    ) -> None:
        self._require(is_whole(every) and every >= 1, "every", "a whole number >= 1", every)
        self._require(depth is None or (is_whole(depth) and depth >= 1), "depth", "a whole number >= 1, or null", depth)
        self._require(attention in get_args(Attention), "attention", "none, bound or exact", attention)
        self._require(isinstance(logits, bool), "logits", "true or false", logits)
        self._require(compiled in ("eager", "skip"), "compiled", "eager or skip", compiled)
        self.every = int(every)
        self.depth = None if depth is None else int(depth)
        self.attention = attention
        self.logits = logits
        self.compiled = compiled
        self.warn_above = check_limits(warn_above, _WITH_LIMITS, self._require)
        for name, needed in (("attention_logit", ("exact",)), ("attention_bound", ("bound", "exact"))):
            known = name not in self.warn_above or attention in needed
            expected = f"used with attention={' or '.join(needed)}"
            self._require(known, f"warn_above.{name}", expected, self.warn_above.get(name))
        self._look: Look | None = None
        self._begin()

    def _require(self, ok: bool, argument: str, expected: str, got: object) -> None:
        require(ok, self.plugin, argument, expected, got, f"plugins.{self.slot}", type(self).__name__)

    def _begin(self) -> None:
        """A fit begins: nothing was read in it."""
        self._end_look()
        self._seen: list[tuple[int, Stacked[Key]]] = []
        self._looked = self._due = 0
        self._common: CommonReadings | None = None
        self._told = self._failed = False

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return self.plugin

    # ---- Lightning's hooks ------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register with the guard, and discard all readings."""
        if stage == "fit":
            self._begin()
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run looks at the steps at which it would have looked."""
        super().on_train_start(trainer, pl_module)
        if self._guard is not None:
            self._looked = self._guard.decided
            self._common = CommonReadings(self._guard.ranks)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look, if it is time and a window begins."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._end_look()
        guard = self._guard
        if guard is None or guard.window.held:
            return
        step = guard.decided
        if step and (step + 1) // self.every <= self._looked // self.every:
            return
        self._looked = step + 1
        self._due += 1
        if not self._failed and not self._is_refused(guard):
            self._look = Look(guard.module, self.attention, self.logits)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward pass is over."""
        self._end_look()
        super().on_before_backward(trainer, pl_module, loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """There was no backward pass, if the look is still open."""
        self._end_look()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing open."""
        self._end_look()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing open."""
        self._end_look()
        super().on_exception(trainer, pl_module, exception)

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the running fit."""
        return {**super().__getstate__(), "_look": None, "_seen": [], "_common": None}

    # ---- the readings -----------------------------------------------------------------------------------------------

    def _is_refused(self, guard: StepGuard) -> bool:
        """Whether the module must not be observed; the reason is said once."""
        reason = ""
        if self.compiled == "skip" and is_compiled(guard.module):
            reason = "the module is compiled (config key plugins.outputs.compiled)"
        elif (name := with_inference_kernel(guard.module)) is not None:
            reason = f"{name} is in evaluation mode, and torch would not use its inference kernel while it is observed"
        if reason and not self._told and guard.trainer.is_global_zero:
            self._told = True
            logger.info("monitor_activations: nothing is read: %s", reason)
        return bool(reason)

    def _end_look(self) -> None:
        look, self._look = self._look, None
        if look is None:
            return
        numbers = look.close()
        if look.error is None:
            self._seen.append((self._looked - 1, numbers))
        else:
            self._failed = True
            logger.warning("monitor_activations: an error in a reading; no more are made", exc_info=look.error)

    def metrics(self) -> dict[str, float]:
        """The readings since the last call, copied from the device in one transfer. A collective after a look."""
        self._end_look()  # a callback has ended the epoch before the step
        guard, common, due, self._due = self._guard, self._common, self._due, 0
        seen, self._seen = self._seen, []
        if guard is None or common is None or not due:
            return {}
        readings = Readings(ModuleLayers([name for name, _ in guard.module.named_parameters()], self.depth))
        for numbers in read([stacked for _, stacked in seen]):
            readings.add(numbers)
        found = values(*common.of(readings.sums, readings.maxima))
        key = f"plugins.{self.slot}"
        for event in warnings_of(by_reading(found.items()), self.warn_above, self._looked - 1, self.plugin, key):
            guard.report(event)
        return {name if name in _OF_MODEL else f"{metric_names.LAYERS}{name}": value for name, value in found.items()}
