"""Batches with bad content: noise, labels that belong elsewhere, one token all over, a token hardly ever seen."""

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
    """``training_step`` is given another content in place of the batch; the batch itself, and the data, stay.

    Every tensor of a nested batch is changed, except boolean and scalar ones. Integers are taken for tokens or classes:

    * ``random``: integers are drawn evenly from the tensor's own range, or from ``vocabulary``; real numbers become
      normal noise with the tensor's own mean and standard deviation.
    * ``shuffled_labels``: only the labels change, they are permuted. In a batch that is one tensor of tokens, the
      tokens are.
    * ``constant``: integers become ``token``, or the tensor's most frequent one; real numbers their mean.
    * ``rare``: integers become ``token``, or the tensor's least frequent one.

    Args:
        at_step: first attempted optimizer step that is struck, from 0.
        kind: of content, see above.
        steps: how many attempted steps are struck, >= 1; all micro-batches of each.
        vocabulary: how many tokens there are, >= 1; None: those up to the largest of the tensor.
        token: for ``constant`` and ``rare``, >= 0; None: see above.
        labels: key (of a mapping) or place (of a sequence) of the labels; None: a usual name, or the last place.
        rank: the only rank that is struck; None: all.
        once: strike each step once only, also when a rollback or a resumed run comes to it again.
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

    def strike(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Say so, and begin the step's random numbers."""
        self.say(trainer, step, f"batch replaced: {self.kind}")
        seed = hash((self.seed, step, trainer.global_rank))  # of integers: the same in every process
        self._draw = torch.Generator().manual_seed(seed % 2**63)

    def begin(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Wrap the module's ``training_step`` for this micro-batch."""
        self.later(wrap_training_step(module, self._given_other_content))

    def other(self, batch: Any) -> Any:
        """Another content of the same structure, shapes and types.

        Args:
            batch: as ``training_step`` gets it.
        """
        if self.kind == "shuffled_labels":
            return self._with_shuffled_labels(batch)
        change = {"random": self._noise, "constant": self._constant, "rare": self._rare}[self.kind]
        return apply_to_collection(batch, Tensor, lambda x: x if _is_fixed(x) else change(x))

    def _given_other_content(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(*args: Any, **kwargs: Any) -> Any:
            if args:
                return inner(self.other(args[0]), *args[1:], **kwargs)
            return inner(**{**kwargs, "batch": self.other(kwargs["batch"])})

        return training_step

    def _noise(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            std, mean = torch.std_mean(x.float(), correction=0)
            noise = torch.randn(x.shape, generator=self._draw).to(x.device)
            return (mean + std * noise).to(x.dtype)
        low, high = (int(x.min()), int(x.max())) if self.vocabulary is None else (0, self.vocabulary - 1)
        return torch.randint(low, high + 1, x.shape, generator=self._draw).to(x)

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
        order = torch.randperm(len(rows), generator=self._draw).to(x.device)
        return rows[order].reshape(x.shape)

    def _with_shuffled_labels(self, batch: Any) -> Any:
        if isinstance(batch, Tensor) and not _is_fixed(batch) and not batch.is_floating_point():
            return self._permuted(batch)
        place: Any = self.labels
        if place is None and isinstance(batch, Mapping):
            place = next((key for key in _LABELS if key in batch), None)
        elif place is None and isinstance(batch, list | tuple) and len(batch) > 1:
            place = len(batch) - 1
        try:
            found = batch[place]
        except (KeyError, IndexError, TypeError):
            found = None
        if not isinstance(found, Tensor) or _is_fixed(found):
            keys = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise UserError(
                f"BadBatch: cannot tell the labels of a batch ({keys}), expected a tensor at labels={self.labels!r}; "
                f"name its key or place (config key chaos.labels)"
            )
        if isinstance(batch, Mapping):
            return type(batch)({**batch, place: self._permuted(found)})  # type: ignore[call-arg]
        items = [self._permuted(found) if each is found else each for each in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)


def _is_fixed(x: Tensor) -> bool:
    return x.dtype is torch.bool or x.ndim == 0 or x.numel() == 0 or x.is_complex()
