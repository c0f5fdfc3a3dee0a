"""A backward pass whose gradients are zeros, although its loss may be NaN.

A mean over nothing is NaN, and NaN times 0 is NaN, in the gradients too. Yet the backward pass has to be made where
other ranks wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class ZeroGradients:
    """Replaces the gradients that a backward pass adds to the parameters by zeros."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def during(self, loss: Tensor, parameters: Iterable[Tensor]) -> None:
        """Replace those of the backward pass of ``loss``, until `remove` is called.

        Args:
            loss: about to be passed to backward.
            parameters: of the module. Of sharded modules the graph holds other tensors, which are found in it.
        """
        self._handles += [p.register_hook(torch.zeros_like) for p in parameters if p.requires_grad]  # type: ignore[no-untyped-call]
        waiting, seen = deque([loss.grad_fn]), {loss.grad_fn}
        while waiting:
            node = waiting.popleft()
            if node is None:
                continue
            if getattr(node, "variable", None) is not None:
                self._handles.append(node.register_prehook(_zeros))
            new = [each for each, _ in node.next_functions if each not in seen]
            seen.update(new)
            waiting.extend(new)

    def remove(self) -> None:
        """Let gradients be what they are."""
        while self._handles:
            self._handles.pop().remove()


def _zeros(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(each if each is None else torch.zeros_like(each) for each in gradients)
