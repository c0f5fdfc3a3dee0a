"""MuonClip's qk-clip: query and key weights of a head shrink after a step in which its largest logit was too large."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from stabletrain.core.metric_names import MetricInfo
from stabletrain.core.planned import Planned, Sizes
from stabletrain.errors import UserError, is_number, is_whole
from stabletrain.runtime.guard.callbacks import PluginMember
from stabletrain.runtime.guard.optimizer_buffers import parameters_of
from stabletrain.runtime.internals.compiled import is_compiled
from stabletrain.runtime.internals.trainer import has_all_modules
from stabletrain_plugins.clip_qk.logit_watch import LogitWatch
from stabletrain_plugins.clip_qk.projections import Patterns, Projection
from stabletrain_plugins.clip_qk.scaling import Scaling, factors
from stabletrain_plugins.clip_qk.weight_copies import refuse_copies

METRICS = (
    MetricInfo("stability/qk_logit", "logits", "largest attention logit of a head that clip_qk watches"),
    MetricInfo("stability/qk_clipped_heads", "heads", "whose queries and keys clip_qk scaled, mean over the steps"),
)


@dataclass(eq=False)
class ClipQK(PluginMember):
    """Scale the query and key weights of attention heads whose largest logit is above ``tau`` (MuonClip's rule).

    After each applied step, for each head ``eta = min(1, tau / largest logit)``, with the exact logits of all forward
    passes of that step, over micro-batches and ranks, masked entries left out. The head's rows of the query projection
    and of its bias are multiplied by sqrt(eta), those of the key projection by the same; keys that several heads share
    by that of the smallest eta of their group. Other heads keep their bits. A dropped step scales nothing.

    Modules are named by ``qkv``, or by ``query`` and ``key``; without any of these, all ``nn.MultiheadAttention`` of
    the module. A fused projection has the rows of all queries, then of all keys, then of all values.

    Args:
        tau: limit of the logits, with the attention's scale, > 0.
        qkv: a regular expression for the whole name of fused projections (``nn.Linear``), or of
            ``nn.MultiheadAttention``.
        query: a regular expression for the whole name of separate query projections (``nn.Linear``).
        key: of the key projections, as many, in the same order.
        heads: number of heads of the queries; None: of ``nn.MultiheadAttention``, which knows it.
        kv_heads: number of heads of the keys, a divisor of ``heads``; None: that of the rows of ``key``, or ``heads``.
        name: name in checkpoints and metrics; needed when one run has two of them.

    Raises:
        UserError: if an argument is out of range; when training starts, if a pattern matches nothing, the rows cannot
            be divided into heads, or the module is compiled; in the first step, if the attention of a matched module
            is not seen, or is not computed from its rows (qk-norm, MLA).

    References:
        Kimi Team, Kimi K2: Open Agentic Intelligence, 2025, section 2.1, https://arxiv.org/abs/2507.20534

    >>> ClipQK(qkv=r".*\\.attention\\.qkv", heads=4).tau
    100.0
    """

    plugin = "clip_qk"
    slot = "qk"
    needs_attention = True

    tau: float = 100.0
    qkv: str | None = None
    query: str | None = None
    key: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    name: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.require(is_number(self.tau) and 0 < self.tau < math.inf, "tau", "a number > 0")
        for argument in ("qkv", "query", "key"):
            pattern = getattr(self, argument)
            self.require(pattern is None or _is_pattern(pattern), argument, "a regular expression, or null")
        for argument in ("heads", "kv_heads"):
            count = getattr(self, argument)
            self.require(count is None or (is_whole(count) and count >= 1), argument, "a whole number >= 1, or null")
        both = "given with the other one of query and key, and without qkv"
        self.require((self.query is None) == (self.key is None), "key" if self.key else "query", both)
        self.require(self.qkv is None or self.query is None, "qkv", "null if query and key are given")
        self._watch: LogitWatch | None = None
        self._scalings: list[Scaling] = []
        self._largest: dict[int, Tensor] = {}
        self._unknown: set[int] = set()
        self._reset_metrics()

    def _reset_metrics(self) -> None:
        self._readings: Tensor | None = None

    # ---- the fit ----------------------------------------------------------------------------------------------------

    def prepare_trainer(self, trainer: Trainer, module: LightningModule) -> None:
        """Check before a fit that the projections are found, unless ``configure_model`` is still to make them.

        Args:
            trainer: that this callback is in.
            module: to be trained.

        Raises:
            UserError: as the fit would raise it.
        """
        if has_all_modules(module):
            self._find(module)

    def planned(self, trainer: Trainer, sizes: Sizes) -> Planned:
        """What it will do, for a dry run.

        Args:
            trainer: of the traced steps.
            sizes: of the run.
        """
        found = self._find(trainer.lightning_module)
        text = f"computes the largest logits of {len(found)} attentions in every step, and holds them to {self.tau:g}"
        return Planned(text=f"{text} ({found[0].name}, ...)")

    def on_optimizer_ready(self, trainer: Trainer) -> None:
        """Find the projections, and the rows that each optimizer trains."""
        super().on_optimizer_ready(trainer)
        assert self._guard is not None, "called by the guard"
        module = self._guard.module
        self._stop()
        self._reset_metrics()
        projections = self._find(module)
        if is_compiled(module):
            raise UserError(
                f"{self.plugin}: {type(module).__name__} is compiled, and queries and keys are not seen in compiled "
                "code. Train it without torch.compile, or remove the plugin (config key plugins/qk=none)"
            )
        trained = [set(parameters_of(each)) for each in trainer.optimizers]
        for each in projections:
            if any(not any(rows.parameter in own for own in trained) for rows in each.rows):
                setting = self.setting("qkv" if self.query is None else "query")
                raise UserError(f"{self.plugin}: {setting}: {each.name} is not trained by any optimizer")
        device = projections[0].rows[0].parameter.device
        self._scalings = [Scaling(projections, own, device) for own in trained]
        self._watch = LogitWatch(module, projections, len(trained), self.setting)
        self._largest, self._unknown = {}, set(range(len(trained)))
        self._optimizer_ids = [id(each) for each in trainer.optimizers]

    def _find(self, module: LightningModule) -> list[Projection]:
        heads, kv_heads = (None if count is None else int(count) for count in (self.heads, self.kv_heads))
        return Patterns(self.qkv, self.query, self.key, heads, kv_heads, self.setting).find(module)

    # ---- the forward passes -----------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """See the attention of this micro-batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._watch is not None:
            self._watch.open()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Its forward pass is over; what the backward pass computes again is not seen."""
        if self._watch is not None:
            self._watch.close()
        super().on_before_backward(trainer, pl_module, loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With manual optimization, more forward passes may follow in the same batch."""
        super().on_after_backward(trainer, pl_module)
        if self._watch is not None and not pl_module.automatic_optimization:
            self._watch.open()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The forward passes of a step are over."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._watch is not None:
            step = self._optimizer_ids.index(id(optimizer))
            if self._scalings[step].parameters:  # the step of another optimizer may be made without attention
                self._watch.end_first_step()
            self._largest[step] = self._watch.take(step)

    def on_update(self, optimizer: Optimizer, dropped: Tensor | None) -> None:
        """Scale the rows, on the device; a collective if there are several ranks."""
        step = self._optimizer_ids.index(id(optimizer))
        largest = self._largest.pop(step, None)
        if largest is None or self._guard is None:
            return
        if step in self._unknown and (dropped is None or not bool(dropped)):
            self._unknown.discard(step)
            refuse_copies(optimizer, self._guard.module, self._scalings[step].parameters)
        largest = self._guard.ranks.max_tensor(largest)
        eta = factors(largest, self.tau)
        if dropped is not None:
            eta = torch.where(dropped.to(eta.device) > 0, torch.ones_like(eta), eta)
        self._scalings[step].apply(eta)
        self._read(largest, eta, dropped)

    def _read(self, largest: Tensor, eta: Tensor, dropped: Tensor | None) -> None:
        """Add a step to the readings: the largest logit, the sum of scaled heads, the number of steps."""
        reading = torch.stack([largest.max(), (eta < 1).sum().to(largest.dtype), torch.ones_like(largest[0])])
        if dropped is not None:
            nothing = torch.tensor([-math.inf, 0.0, 0.0], device=largest.device)
            reading = torch.where(dropped.to(largest.device) > 0, nothing, reading)
        before = self._readings
        if before is not None:
            reading = torch.cat([torch.maximum(before[:1], reading[:1]), before[1:] + reading[1:]])
        self._readings = reading

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch without a backward pass is over, too."""
        if self._watch is not None:
            self._watch.close()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget a window that was not finished."""
        if self._watch is not None:
            self._watch.close()
            if pl_module.automatic_optimization:
                self._watch.forget()
        super().on_train_epoch_end(trainer, pl_module)

    def metrics(self) -> dict[str, float]:
        """The largest logit and the mean number of scaled heads of the steps since the last call, in one transfer."""
        readings = self._readings
        self._reset_metrics()
        if readings is None:
            return {}
        largest, clipped, steps = readings.tolist()
        if not steps:
            return {}
        prefix = f"{self.name}/" if self.name else ""
        found = {"qk_logit": largest, "qk_clipped_heads": clipped / steps}
        return {f"{prefix}{key}": value for key, value in found.items() if math.isfinite(value)}

    # ---- the end ----------------------------------------------------------------------------------------------------

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching."""
        self._stop()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._stop()
        super().on_exception(trainer, pl_module, exception)

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the running fit."""
        fit: dict[str, Any] = {"_watch": None, "_scalings": [], "_largest": {}, "_unknown": set(), "_readings": None}
        return {**super().__getstate__(), **fit}

    def _stop(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()


def _is_pattern(pattern: object) -> bool:
    try:
        re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError):
        return False
    return isinstance(pattern, str)
