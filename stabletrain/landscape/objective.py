"""The loss of fixed batches as a function of a module's weights: values, and products with its Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stabletrain.runtime import rng
from stabletrain.runtime.hidden.hidden_state import HiddenState

Weights = Sequence[Tensor]
"""One tensor for each of `Objective.parameters`, of its shape."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DIFFERENCE = 1e-3
"""Length of the step to each side in weight space where gradients are differenced: in fp32, 1e-4 from exact products on
a small GPT."""


class Objective:
    """The mean loss of a module over fixed batches, with dropout off.

    Each evaluation begins with the same buffers, the same tensors in plain attributes (a recurrent state) and the same
    state of the random generators, so that it is a function of the weights alone.

    Args:
        module: whose trained parameters are the variables.
        losses: for each batch, a function that computes its loss with a forward pass of the module.
        batch_stats: let BatchNorm use the statistics of the batch, as in training; False: its running statistics.
    """

    def __init__(self, module: nn.Module, losses: Sequence[Callable[[], Tensor]], *, batch_stats: bool = False) -> None:
        self.module, self.losses, self.batch_stats = module, list(losses), batch_stats
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad and p.is_floating_point()]
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.size = sum(p.numel() for p in self.parameters)
        """Number of variables."""
        self.passes = 0
        """Forward passes so far."""
        self.by_differences = False
        """Whether products with the Hessian are differences of gradients, since the module has no second derivative."""
        trained = {id(p) for p in self.parameters}
        self._fixed = [*(p for p in module.parameters() if id(p) not in trained), *module.buffers()]
        self._registered = [
            (each._buffers, name, buffer) for each in module.modules() for name, buffer in each._buffers.items()
        ]
        self._start: list[Tensor] = []
        self._random: rng.RngState = {}
        self._hidden = HiddenState(module)
        self._is_checked = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Within it the weights may be moved; weights, buffers, modes and random generators are put back at its end."""
        modes = [(each, each.training) for each in self.module.modules()]
        weights, fixed = self.weights(), self.fixed()
        with ExitStack() as stack:
            stack.callback(_set_modes, modes)
            self._random = stack.enter_context(rng.preserved())
            stack.callback(lambda: self.move(weights, fixed))
            # an eager step: what torch.compile makes of a module has no second derivative
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            self.module.eval()
            for each in self.module.modules() if self.batch_stats else ():
                if isinstance(each, _BATCH_NORMS):
                    each.train()
            self._start = fixed
            self._hidden.stash()
            yield

    def weights(self) -> list[Tensor]:
        """A copy of the weights."""
        return [p.detach().clone() for p in self.parameters]

    def fixed(self) -> list[Tensor]:
        """A copy of what is no variable: buffers and frozen parameters."""
        return [each.detach().clone() for each in self._fixed]

    def move(self, weights: Weights, fixed: Weights | None = None) -> None:
        """Set the weights.

        Args:
            weights: of the shapes of the parameters, on any device.
            fixed: from `fixed`, for this and further evaluations; None: as before.
        """
        _copy(self.parameters, weights)
        if fixed is not None:
            self._start = list(fixed)
            self._put_back()

    def loss(self) -> float:
        """The mean loss at the present weights, in the unit of the module's loss; may be NaN or infinite."""
        with torch.enable_grad(), self._evaluation():  # as in training: the loss may have a gradient in it
            found = [float(self._loss(each).detach()) for each in self.losses]
        return sum(found) / len(found)

    def product(self, vector: Tensor) -> Tensor:
        """The Hessian of the mean loss at the present weights, times a vector.

        Args:
            vector: 1-D, of `size` numbers, in the order of the parameters.

        Returns:
            1-D, of the same size.
        """
        parts = self._divided(vector)
        if not self.by_differences:
            try:
                return self._exact(parts)
            except _NoSecondDerivative:
                self.by_differences = True
        return self._difference(parts, float(vector.norm()))

    def _exact(self, parts: Weights) -> Tensor:
        total = torch.zeros(self.size, device=parts[0].device, dtype=parts[0].dtype)
        # the fused attention kernels and those of cuDNN for recurrent layers have no second derivative
        with (
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=False),
            self._evaluation(),
        ):
            for each in self.losses:
                loss = self._loss(each)
                if not self._is_checked and _has_own_function(loss):
                    raise _NoSecondDerivative
                total += self._exact_of(loss, parts)
        self._is_checked = True
        return total / len(self.losses)

    def _exact_of(self, loss: Tensor, parts: Weights) -> Tensor:
        try:
            gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
            pairs = [(g, v) for g, v in zip(gradients, parts, strict=True) if g is not None and g.requires_grad]
            if not pairs:  # a loss that is linear in the weights
                return torch.zeros(self.size, device=parts[0].device, dtype=parts[0].dtype)
            found = torch.autograd.grad(
                [g for g, _ in pairs], self.parameters, [v for _, v in pairs], allow_unused=True
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # NotImplementedError, too
            raise _NoSecondDerivative from error
        return self._joined(found)

    def _difference(self, parts: Weights, norm: float) -> Tensor:
        if not norm:
            return torch.zeros(self.size, device=parts[0].device, dtype=parts[0].dtype)
        here, step = self.weights(), _DIFFERENCE / norm
        try:
            ends = []
            for sign in (step, -step):
                self.move([w + sign * v for w, v in zip(here, parts, strict=True)])
                ends.append(self._gradient())
        finally:
            self.move(here)
        return (ends[0] - ends[1]) / (2 * step)

    def _gradient(self) -> Tensor:
        total = torch.zeros(self.size, device=self.parameters[0].device, dtype=self.parameters[0].dtype)
        kept = [p.grad for p in self.parameters]
        try:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), self._evaluation():
                for each in self.losses:
                    for p in self.parameters:
                        p.grad = None
                    # not autograd.grad, to which weights within a reentrant activation checkpoint seem to be unused
                    self._loss(each).backward()  # type: ignore[no-untyped-call]
                    total += self._joined([p.grad for p in self.parameters])
        finally:
            for p, grad in zip(self.parameters, kept, strict=True):
                p.grad = grad
        return total / len(self.losses)

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        rng.restore(self._random)
        try:
            yield
        finally:
            self._put_back()
            self._hidden.restore()

    def _put_back(self) -> None:
        for buffers, name, buffer in self._registered:  # a forward may have registered another tensor
            buffers[name] = buffer
        _copy(self._fixed, self._start)

    def _loss(self, compute: Callable[[], Tensor]) -> Tensor:
        self.passes += 1
        return compute()

    def _divided(self, vector: Tensor) -> list[Tensor]:
        first = self.parameters[0]
        sizes = [p.numel() for p in self.parameters]
        parts = torch.split(vector.to(first.dtype).to(first.device), sizes)
        return [part.view_as(p).to(p) for part, p in zip(parts, self.parameters, strict=True)]

    def _joined(self, parts: Sequence[Tensor | None]) -> Tensor:
        dtype, device = self.parameters[0].dtype, self.parameters[0].device
        pairs = zip(parts, self.parameters, strict=True)
        found = [torch.zeros_like(p) if each is None else each.detach() for each, p in pairs]
        return torch.cat([each.to_dense().reshape(-1).to(device, dtype) for each in found])


class _NoSecondDerivative(Exception):
    """A part of the module has none, such as a fused kernel, or may have a wrong one."""


def _has_own_function(loss: Tensor) -> bool:
    """Whether a ``torch.autograd.Function`` took part in a loss.

    If its backward calls a kernel, or is marked as ``once_differentiable``, the second derivative may lack a part
    without any error: torch then takes what the function has saved for constants.
    """
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        left += [each for each, _ in node.next_functions]
    return False


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            if not _is_expanded(target):
                target.copy_(source)


def _is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, so that torch lets nobody write to it in place."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _set_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
