"""What a precision did to a run: gradients that underflow, by layer, and memory that it saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stabletrain.runtime import gradients

_MOST = 16_384
"""Elements of a gradient that are read in one sample, evenly spread over it."""
_HALF = (torch.float16, torch.bfloat16)


class Underflow(NamedTuple):
    """The gradients of a layer in the samples.

    Args:
        underflow: share of the elements that are zero, or below the smallest normal number of the format at the loss
            scale, where bits are lost. Zeros of another cause, such as tokens that a batch lacks, count, too.
        zero: share of the elements that are zero.
    """

    underflow: float
    zero: float


class UnderflowSamples:
    """Counts elements of gradients on the device.

    Args:
        smallest: the smallest normal number of the format in which gradients are computed.
    """

    def __init__(self, smallest: float) -> None:
        self._smallest = smallest
        self._earlier: dict[str, list[float]] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, named: Sequence[tuple[str, Tensor]], scale: float) -> None:
        """Take one sample.

        Args:
            named: parameters with a gradient, unscaled, by name.
            scale: the loss scale at which the gradients were computed.
        """
        for name, gradient in named:
            flat = gradients.local(gradient.detach()).reshape(-1)
            size = flat[:: -(-flat.numel() // _MOST) or 1].abs().float() * scale
            finite = size.isfinite()  # an overflow says nothing about small values
            counts = torch.stack([(size < self._smallest).sum(), (size == 0).sum(), finite.sum()]).double()
            layer = name.rpartition(".")[0] or name
            self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts

    def state(self) -> dict[str, list[float]]:
        """The counts by layer: below the smallest normal number, zero, all."""
        found = {layer: list(counts) for layer, counts in self._earlier.items()}
        for layer, counts in self._counts.items():
            earlier = found.get(layer, [0.0, 0.0, 0.0])
            found[layer] = [a + b for a, b in zip(earlier, counts.tolist(), strict=True)]
        return found

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continue from what `state` returned."""
        self._earlier = {str(layer): [float(each) for each in counts] for layer, counts in state.items()}
        self._counts = {}

    def shares(self) -> dict[str, Underflow]:
        """The shares by layer."""
        return {layer: Underflow(low / n, zero / n) for layer, (low, zero, n) in self.state().items() if n}


class SavedMemory:
    """Measures, in one micro-batch, what the outputs of modules would need more in fp32.

    Counted are the outputs of innermost modules, which are kept for backward; what is computed between them by
    functions is not. The copies of weights that autocast makes are subtracted.

    Args:
        module: that is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self._leaves = [each for each in module.modules() if not any(True for _ in each.children())]
        self.of_parameters = sum(4 * p.numel() for p in module.parameters() if p.dtype in _HALF and p.requires_grad)
        """Bytes that parameters and their gradients save."""
        self.of_activations: int | None = None
        """Bytes; None: not measured yet."""

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Within it, outputs are counted by hooks, which change nothing."""
        saved = 0

        def count(module: nn.Module, _: Any, output: Any) -> None:
            nonlocal saved
            if isinstance(output, Tensor) and output.dtype in _HALF and output.requires_grad:
                weights = (p for p in module.parameters(recurse=False) if p.dim() > 1 and p.dtype not in _HALF)
                saved += output.nbytes - sum(2 * p.numel() for p in weights)

        hooks = [each.register_forward_hook(count) for each in self._leaves]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.of_activations = saved


def table(shares: Mapping[str, Underflow], most: int = 12) -> list[str]:
    """One line for each of the layers with the largest underflow."""
    worst = sorted(shares.items(), key=lambda each: -each[1].underflow)[:most]
    width = max((len(layer) for layer, _ in worst), default=0)
    return [f"{layer.ljust(width)}  underflow {each.underflow:7.2%}  zero {each.zero:7.2%}" for layer, each in worst]
