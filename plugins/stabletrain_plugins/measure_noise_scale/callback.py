"""The gradient noise scale, from the norms of micro-batches and of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from stabletrain.core.metric_names import MetricInfo
from stabletrain.core.outcome import Outcome
from stabletrain.errors import UserError, is_number, require
from stabletrain.runtime import gradients
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.missing_loss import NoBatch
from stabletrain.runtime.guard.support import refuse_manual
from stabletrain.runtime.internals.packages import both
from stabletrain.runtime.windows.batches import BatchCount, Count, check_count
from stabletrain.settings import worded
from stabletrain_plugins.measure_noise_scale.estimate import Averages, Window, estimate

METRICS = (
    MetricInfo("stability/noise_scale", "rows or tokens", "gradient noise scale tr(S) / |G|^2: a proxy"),
    MetricInfo("stability/noise_scale_square", "L2 squared", "|G|^2, the gradient without noise, averaged"),
    MetricInfo("stability/noise_scale_trace", "L2 squared", "tr(S), the noise of the gradient of one row, averaged"),
)


class MeasureNoiseScale(GuardMember):
    """Log the gradient noise scale tr(S) / |G|^2, a proxy of the critical batch size.

    Args:
        every: attempted steps between measurements, >= 1.
        decay: weight of the past in the averages of |G|^2 and tr(S), above 0 and below 1.
        count: what is counted in a batch, as in ``AccumulateTokens``; None: rows.
        ignore_index: elements of that entry with this value do not count; None: all do.

    Raises:
        UserError: if an argument is out of range; when training starts, if a step has one micro-batch on one rank, the
            module steps by hand, or the strategy shards the model.

    >>> MeasureNoiseScale(every=10).every
    10
    """

    plugin: ClassVar[str] = "measure_noise_scale"
    slot: ClassVar[str] = "noise_scale"
    least_micro_batches: ClassVar[int] = 2

    _squares: list[Tensor]
    _seen: list[tuple[Tensor, int, float]]

    def __init__(
        self, every: int = 1, decay: float = 0.999, count: Count = None, ignore_index: int | None = -100
    ) -> None:
        whole = isinstance(every, int) and not isinstance(every, bool)
        self._require(whole and every >= 1, "every", "a whole number >= 1", every)
        self._require(is_number(decay) and 0 < decay < 1, "decay", "above 0 and below 1", decay)
        check_count(count, ignore_index, self._require)
        self.every = every
        self.decay = decay
        self.count = count
        self.ignore_index = ignore_index
        self._handles: list[Any] = []
        self.reset()

    def _require(self, ok: bool, argument: str, expected: str, got: object) -> None:
        require(ok, self.plugin, argument, expected, got, f"plugins.{self.slot}", type(self).__name__)

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return self.plugin

    def reset(self) -> None:
        """Forget all measurements."""
        self.averages = Averages()
        self._pending: tuple[Tensor, Tensor] | None = None
        self._start_window()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register with the guard."""
        if stage == "fit":
            refuse_manual(type(self).__name__, pl_module)
            if not isinstance(trainer.strategy, (*both(DDPStrategy), *both(SingleDeviceStrategy))):
                raise UserError(
                    f"{type(self).__name__}: {type(trainer.strategy).__name__} adds up the gradients of the ranks "
                    "before those of a single rank can be read. Use strategy=ddp, or plugins/noise_scale=none"
                )
            setting = worded(f"{self.plugin}: plugins.{self.slot}.count", self.slot, type(self).__name__)
            self._counts = BatchCount(self.count, self.ignore_index, setting)
            self._start_window()
            self._pending = None
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run in which no step has two micro-batches."""
        super().on_train_start(trainer, pl_module)
        assert self._guard is not None, "the guard is created in setup"
        if trainer.world_size == 1 and self._guard.window.largest == 1:
            raise UserError(
                f"{type(self).__name__}: the noise scale compares gradients of micro-batches with that of the step, "
                "and here a step is one micro-batch on one rank. Accumulate over two or more (config key "
                "trainer.accumulate_grad_batches), or use plugins/noise_scale=none"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count, and in a step that is measured watch the gradients of the parameters."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert self._guard is not None, "the guard is created in setup"
        if self._guard.window.is_empty and not self._guard.window.held:
            self._start_window()
        self._remove()
        if self._guard.decided % self.every:
            return
        self._here = 0 if isinstance(batch, NoBatch) else self._counts(batch, tells=trainer.is_global_zero)
        self._passes = 0
        self._squares = []
        self._handles = [p.register_hook(self._see) for p in pl_module.parameters() if p.requires_grad]  # type: ignore[no-untyped-call]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """A backward pass begins; a micro-batch that is run in pieces has several, and is not measured."""
        super().on_before_backward(trainer, pl_module, loss)
        self._passes += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The backward pass is over; its squares were added if the step goes on."""
        self._end_micro_batch()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_gradients(self, step: int, parameters: Sequence[Tensor]) -> None:
        """The step's gradient is complete: add up over the ranks, and keep the result until its outcome is known."""
        self._end_micro_batch()
        assert self._guard is not None, "the guard is created in setup"
        seen, spoilt = self._seen, self._spoilt
        self._start_window()
        if self._guard.decided % self.every:
            return
        device, size = parameters[0].device, float(self._guard.window.size)
        scale = self._guard.loss_scale
        rows = [torch.zeros(6, device=device)]
        for square, count, weight in seen:
            numbers = [1.0 / count, weight * weight / count, weight, 1.0]
            mean = square * (size / (scale * weight)) ** 2
            rows.append(torch.cat([mean.view(1), torch.tensor([*numbers, 0.0], device=device)]))
        rows.append(torch.tensor([0.0] * 5 + [float(spoilt)], device=device))
        total = self._guard.ranks.sum_tensor(torch.stack(rows).sum(0))
        self._pending = (total, gradients.global_norm(gradients.of(parameters)))

    def on_outcome(self, outcome: Outcome) -> None:
        """An applied step becomes part of the averages; a dropped one is a step never seen."""
        pending, self._pending = self._pending, None
        if pending is None or not outcome.applied:
            return
        *sums, spoilt = pending[0].tolist()
        found = None if spoilt else estimate(Window(*sums), float(pending[1]))
        if found is not None:
            self.averages = self.averages.add(*found, self.decay)

    def metrics(self) -> dict[str, float]:
        """The averages, and their ratio where there is one."""
        if not self.averages.weight:
            return {}
        scale = self.averages.scale
        weight = self.averages.weight
        own = {"square": self.averages.square / weight, "trace": self.averages.trace / weight}
        named = {f"noise_scale_{key}": value for key, value in own.items()}
        return named if scale is None else {"noise_scale": scale, **named}

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {**super().state_dict(), "averages": list(self.averages)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint."""
        super().load_state_dict(state_dict)
        self.averages = Averages(*map(float, state_dict.get("averages", ())))
        self._pending = None
        self._start_window()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching."""
        self._remove()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._remove()
        super().on_exception(trainer, pl_module, exception)

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the running fit."""
        own = super().__getstate__()
        return {**own, "_handles": [], "_pending": None, "_seen": [], "_squares": []}

    def _start_window(self) -> None:
        self._seen = []
        self._squares = []
        self._here, self._passes, self._spoilt = 0, 0, False

    def _see(self, gradient: Tensor) -> None:
        """The gradient of one micro-batch; the sum over the window is in ``grad``."""
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        self._squares.append(torch.linalg.vector_norm(values.detach(), dtype=torch.float32).square())

    def _end_micro_batch(self) -> None:
        self._remove()
        squares, self._squares = self._squares, []
        if not squares:
            return
        assert self._guard is not None, "the guard is created in setup"
        weights = self._guard.weights_of_window
        weight = weights[-1] if weights else 1.0
        if self._passes != 1:
            self._spoilt = True
        elif self._here and weight:
            self._seen.append((torch.stack(squares).sum(), self._here, weight))

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
