"""Batches with bad content: noise, wrong labels, one constant token, or a rare token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from stabletrain.chaos.fault import Fault, wrap_training_step
from stabletrain.errors import UserError

_LABELS = ("labels", "label", "targets", "target", "y")
_KINDS = ("random", "shuffled_labels", "constant", "rare")


class BadBatch(Fault):
    """Passes a batch with other content to ``training_step``; the batch itself and the data are unchanged.

    All tensors of a nested batch are replaced, except boolean and scalar ones. Integers are tokens or classes:

    * ``random``: integers are drawn uniformly from the tensor's range, or from ``vocabulary``; floating-point tensors
      become normal noise with the tensor's mean and standard deviation.
    * ``shuffled_labels``: the labels are permuted, and nothing else changes. If the batch is one tensor of tokens, the
      tokens are permuted.
    * ``constant``: integers become ``token``, or the tensor's most frequent value; floating-point values their mean.
    * ``rare``: integers become ``token``, or the tensor's least frequent value.

    Args:
        at_step: first attempted optimizer step with the fault, from 0.
        kind: of the content, see above.
        steps: number of attempted steps with the fault, >= 1; it affects all their micro-batches.
        vocabulary: number of tokens, >= 1; None: draw from the range of the tensor's values.
        token: for ``constant`` and ``rare``, >= 0; None: see above.
        labels: key (in a mapping) or index (in a sequence) of the labels; None: a usual name, or the last element.
        rank: the only rank with the fault; None: all ranks.
        once: apply the fault to each step only once, even if a rollback or a resumed run repeats the step.
        seed: of the random numbers, >= 0.

    Raises:
        UserError: if an argument is out of range, or the batch has no labels to shuffle.
    """

    def __init__(
        self,
        at_step: int,
        kind: Literal["random", "shuffled_labels", "constant", "rare"] = "random",
        steps: int = 1,
        vocabulary: int | None = None,
        token: int | None = None,
        labels: str | int | None = None,
        rank: int | None = None,
        once: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(at_step, steps, rank, once, seed)
        self.kind = kind
        self.vocabulary = vocabulary
        self.token = token
        self.labels = labels
        self.require(kind in _KINDS, "kind", f"one of {', '.join(_KINDS)}")
        self.require(vocabulary is None or vocabulary >= 1, "vocabulary", ">= 1 or None")
        self.require(token is None or token >= 0, "token", ">= 0 or None")
        self.require(token is None or kind in ("constant", "rare"), "token", "None unless kind is constant or rare")

    def apply(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log the fault, and seed the step's random numbers."""
        self.log_fault(trainer, step, f"batch replaced: {self.kind}")
        seed = hash((self.seed, step, trainer.global_rank))  # the hash of integers is the same in every process
        self._generator = torch.Generator().manual_seed(seed % 2**63)

    def begin(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Wrap the module's ``training_step`` for this micro-batch."""
        self.undo_later(wrap_training_step(module, self._replace_batch))

    def replacement(self, batch: Any) -> Any:
        """Return a batch with other content and the same structure, shapes and types.

        Args:
            batch: the first argument of ``training_step``.
        """
        if self.kind == "shuffled_labels":
            return self._with_shuffled_labels(batch)
        change = {"random": self._noise, "constant": self._constant, "rare": self._rare}[self.kind]
        return apply_to_collection(batch, Tensor, lambda x: x if _is_fixed(x) else change(x))

    def _replace_batch(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(*args: Any, **kwargs: Any) -> Any:
            if args:
                return inner(self.replacement(args[0]), *args[1:], **kwargs)
            return inner(**{**kwargs, "batch": self.replacement(kwargs["batch"])})

        return training_step

    def _noise(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            std, mean = torch.std_mean(x.float(), correction=0)
            noise = torch.randn(x.shape, generator=self._generator).to(x.device)
            return (mean + std * noise).to(x.dtype)
        low, high = (int(x.min()), int(x.max())) if self.vocabulary is None else (0, self.vocabulary - 1)
        return torch.randint(low, high + 1, x.shape, generator=self._generator).to(x)

    def _constant(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return x.float().mean().to(x.dtype).expand_as(x).clone()
        values, counts = torch.unique(x, return_counts=True)
        return torch.full_like(x, int(values[counts.argmax()]) if self.token is None else self.token)

    def _rare(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return x
        values, counts = torch.unique(x, return_counts=True)
        return torch.full_like(x, int(values[counts.argmin()]) if self.token is None else self.token)

    def _permuted(self, x: Tensor) -> Tensor:
        rows = x if x.is_floating_point() else x.reshape(-1)
        order = torch.randperm(len(rows), generator=self._generator).to(x.device)
        return rows[order].reshape(x.shape)

    def _with_shuffled_labels(self, batch: Any) -> Any:
        if isinstance(batch, Tensor) and not _is_fixed(batch) and not batch.is_floating_point():
            return self._permuted(batch)
        key: Any = self.labels
        if key is None and isinstance(batch, Mapping):
            key = next((name for name in _LABELS if name in batch), None)
        elif key is None and isinstance(batch, list | tuple) and len(batch) > 1:
            key = len(batch) - 1
        try:
            found = batch[key]
        except (KeyError, IndexError, TypeError):
            found = None
        if not isinstance(found, Tensor) or _is_fixed(found):
            content = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise UserError(
                f"BadBatch: cannot find the labels of the batch ({content}), expected a tensor at "
                f"labels={self.labels!r}; set the key or index of the labels (config key chaos.labels)"
            )
        if isinstance(batch, Mapping):
            return type(batch)({**batch, key: self._permuted(found)})  # type: ignore[call-arg]
        items = [self._permuted(found) if each is found else each for each in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)


def _is_fixed(x: Tensor) -> bool:
    return x.dtype is torch.bool or x.ndim == 0 or x.numel() == 0 or x.is_complex()
