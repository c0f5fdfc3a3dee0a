"""Count the floating-point operations of a micro-batch's forward and backward pass, without memory.

Attention is computed by torch's math backend meanwhile: of its fused kernels torch counts some and not others (on the
CPU a context of 64 and one of 512 would cost the same). A causal mask is not deducted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from stabletrain.planning.fit import fit, trainer_of_plan, values_of_generators
from stabletrain.planning.parts import Parts
from stabletrain.planning.plan import Flops
from stabletrain.runtime.internals.fake_world import fake_world
from stabletrain.runtime.internals.shards import class_name
from stabletrain.runtime.windows.batches import samples_and_tokens

_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
_PRODUCTS = (
    F.linear, torch.matmul, torch.mm, torch.t, torch.transpose, Tensor.matmul, Tensor.mm, Tensor.__matmul__,
    Tensor.t, Tensor.transpose, Tensor.T.__get__,  # type: ignore[attr-defined]
)  # fmt: skip
"""Products, and transposing for one, of an embedding's weight, as in an output layer that shares it."""
_LOOKS_UP = (nn.Embedding, nn.EmbeddingBag)


class Counted(BaseException):
    """Ends a fit after the counted micro-batch; no `Exception`, which a module might catch."""


def count_flops(make: Callable[[Any], Parts]) -> Flops:
    """Set up the module of a run in one process without its strategy, and count its first micro-batch.

    What plugins and strategies add, such as the recomputation of checkpointed activations, is not counted: it is no
    work of the model. What the module itself recomputes is.

    Args:
        make: builds the parts of the run, given the mode of a fake world.

    Raises:
        Exception: that ends the step, such as one of a module that reads values of tensors.
    """
    with fake_world(1, values_of_generators()) as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = make(mode)
        arguments = {**parts.arguments, "devices": 1, "num_nodes": 1}
        arguments.pop("strategy", None)
        counter = CountFlops()
        trainer = trainer_of_plan(arguments, [], counter)
        with suppress(Counted):
            fit(trainer, parts.module, parts.data, mode)
        assert counter.found is not None
        return counter.found


class CountFlops(Callback):
    """Counts the operations of a fit's first micro-batch, and ends the fit by `Counted`.

    With manual optimization these are the operations of the whole batch, those of the optimizers among them.
    """

    def __init__(self) -> None:
        self.found: Flops | None = None
        self._stack = ExitStack()
        self._counter = FlopCounterMode(display=False)
        self._calls = _Calls(self._counter)
        self._uncounted: dict[str, bool] = {}
        self._batch: Any = None
        self._forward = 0
        """Operations before the backward pass."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to count."""
        self._batch = batch
        for module in pl_module.modules():
            if not isinstance(module, _LOOKS_UP) and any(p.ndim > 1 for p in module.parameters(recurse=False)):
                self._watch(module)
        self._stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        self._stack.enter_context(self._counter)
        self._stack.enter_context(self._calls)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """What is called from now on is computed a second time."""
        self._forward = self._counter.get_total_flops()
        self._calls.again = pl_module.automatic_optimization

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With automatic optimization, the model's work is done."""
        if pl_module.automatic_optimization:
            self._end(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is done; without a backward pass before, there was no loss."""
        self._end(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting."""
        self._stack.close()

    def _watch(self, module: nn.Module) -> None:
        """Note whether anything is counted while a module with matrices as weights is called."""
        name, before = class_name(module), 0

        def begins(module: nn.Module, inputs: Any) -> None:
            nonlocal before
            before = self._counter.get_total_flops()

        def ends(module: nn.Module, inputs: Any, output: Any) -> None:
            counted = self._counter.get_total_flops() > before
            self._uncounted[name] = self._uncounted.get(name, True) and not counted

        self._stack.callback(module.register_forward_pre_hook(begins).remove)
        self._stack.callback(module.register_forward_hook(ends).remove)

    def _end(self, module: LightningModule) -> None:
        self._stack.close()
        samples, tokens = samples_and_tokens(self._batch)
        if tokens is not None:  # what is looked up is what is computed: targets may be a part of the batch
            tokens = self._calls.looked_up or tokens
        whole = self._counter.get_total_flops()
        # a product has at most two of its size in backward; calls of checkpointed layers there are not seen
        more = module.automatic_optimization and whole > 3 * self._forward > 0
        self.found = Flops(
            micro_batch=whole,
            attention=self._calls.attention,
            samples=samples,
            tokens=tokens,
            embeddings=_embeddings(module, self._calls.multiplied),
            uncounted=sorted(name for name, is_uncounted in self._uncounted.items() if is_uncounted),
            recomputes=more or self._calls.recomputes,
        )
        raise Counted


class _Calls(TorchFunctionMode):
    """Sees calls of attention, of embeddings, and products with an embedding's weight."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self._counter = counter
        self.again = self.recomputes = False
        self.attention = 0
        """Operations of attention, forward and backward: a product of two matrices has two more of its size in
        backward if both need a gradient."""
        self.looked_up = 0
        """The largest number of indices that an embedding has got."""
        self.multiplied: set[int] = set()
        """Ids of parameters that matrices were multiplied with."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ATTENTION:
            before = self._products()
            out = func(*args, **kwargs)
            first = out[0] if isinstance(out, tuple) else out
            of_call = _of_torchs(*args[:2]) if isinstance(out, tuple) else self._products() - before
            self.attention += of_call * (1 if self.again or not first.requires_grad else 3)
            self.recomputes |= self.again
            return out
        if func is F.embedding and isinstance(args[0], Tensor):
            self.looked_up = max(self.looked_up, args[0].numel())
        elif func in _PRODUCTS:
            self.multiplied |= {id(each) for each in args if isinstance(each, nn.Parameter)}
        return func(*args, **kwargs)

    def _products(self) -> int:
        """Operations of products of batches of matrices, and of whole attention, so far."""
        counts = self._counter.get_flop_counts().get("Global", {})
        return sum(n for op, n in counts.items() if "bmm" in str(op) or "attention" in str(op))


def _of_torchs(query: Tensor, key: Tensor) -> int:
    """Operations of attention within ``multi_head_attention_forward``, whose projections may be products of batches.

    Args:
        query: (queries, batch, width) or (queries, width).
        key: (keys, batch, width) or (keys, width).
    """
    return 2 * 2 * query.numel() * len(key)


def _embeddings(module: nn.Module, multiplied: set[int]) -> int:
    """Elements of the parameters that are looked up only: those that an output layer shares are none."""
    looked_up = {id(p): p for each in module.modules() if isinstance(each, _LOOKS_UP) for p in each.parameters()}
    return sum(p.numel() for key, p in looked_up.items() if key not in multiplied)
