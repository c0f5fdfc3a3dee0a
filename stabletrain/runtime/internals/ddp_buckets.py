"""The buckets in which DistributedDataParallel sends gradients: which they are, and wrapping a model with given ones.

DDP begins with buckets in the reverse order of registration, and lays them out anew once, before its second step: in
the order in which the first step's gradients became ready on rank 0. With three ranks or more a gradient's place in its
bucket decides in which order the ranks are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from stabletrain.runtime.internals.loader import override
from stabletrain.runtime.internals.packages import both

Buckets: TypeAlias = list[list[str]]
"""The names of the parameters in each bucket, in their order."""

_OF_REDUCER = ("_rebuild_buckets", "_push_all_rebuilt_params", "_get_zeros_like_grad_buckets")


def is_supported() -> bool:
    """Whether this version of torch has the private functions that are used here."""
    reducer: Any = getattr(torch.distributed, "Reducer", None)
    has_order = hasattr(DistributedDataParallel, "_build_params_for_reducer")
    return has_order and all(hasattr(reducer, name) for name in _OF_REDUCER)


def buckets_of(model: Any, may_lay_out: bool) -> Buckets | None:
    """The buckets that a model's gradients are sent in from now on.

    They are None for a model that DDP does not wrap, before DDP has laid them out (the first step; with
    ``static_graph=True`` the first two), and always with ``find_unused_parameters=True``, which keeps the initial ones.

    Args:
        model: of a strategy, as it is wrapped.
        may_lay_out: whether to lay them out now, as DDP would at the beginning of the next step, if they are not yet. A
            collective then: call it on all ranks, between two steps.
    """
    if not isinstance(model, DistributedDataParallel) or not is_supported() or not hasattr(model, "reducer"):
        return None
    if may_lay_out and not model._has_rebuilt_buckets:
        with suppress(RuntimeError):  # unused parameters, for one: the next step raises it, if there is one
            _lay_out(model)
    if not model._has_rebuilt_buckets:
        return None
    names = {p: name for name, p in model.module.named_parameters()}
    with _NoGradients():  # type: ignore[no-untyped-call]
        found = model.reducer._get_zeros_like_grad_buckets()
    buckets = [[names.get(p, "") for p in each.parameters()] for each in found]
    return None if any("" in each for each in buckets) else buckets  # a parameter was replaced in the module


def around_wrapping(
    trainer: Trainer, wanted: Callable[[], Buckets | None], done: Callable[[str], None]
) -> Callable[[], None]:
    """Let a DDPStrategy wrap the model with given buckets, which DDP then keeps.

    Args:
        trainer: of a fit, in a hook ``setup``.
        wanted: returns the buckets, the same on all ranks; None: DDP begins as always.
        done: called if there were buckets, with the reason if DDP does not use them; empty: it does.

    Returns:
        The function that undoes this.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy, both(DDPStrategy)):
        return lambda: None
    wrap = strategy._setup_model
    options: dict[str, Any] = strategy._ddp_kwargs

    def wrapped(model: nn.Module) -> DistributedDataParallel:
        buckets = wanted()
        if buckets is None:
            plain: DistributedDataParallel = wrap(model)
            return plain
        problem = _problem(model, options)
        if problem:
            ddp: DistributedDataParallel = wrap(model)
        else:
            with _in_order([name for each in buckets for name in each]) as took_order:
                ddp = wrap(model)
            problem = _apply(ddp, buckets) if took_order() else "other parameters are trained than at the checkpoint"
        done(problem)
        return ddp

    return override(strategy, "_setup_model", wrapped)


def _problem(model: nn.Module, options: dict[str, Any]) -> str:
    if not is_supported():
        return f"torch {torch.__version__} lacks the functions for it"
    if options.get("find_unused_parameters") and not options.get("static_graph"):
        return "find_unused_parameters=True keeps the initial ones"
    return ""


def _apply(ddp: DistributedDataParallel, buckets: Buckets) -> str:
    """Lay out the buckets of a model whose parameters DDP has in order; the reason if they are not the given ones."""
    if not hasattr(ddp, "reducer"):
        return "DDP sends all gradients by hooks of its own"
    ddp.reducer._push_all_rebuilt_params()
    _lay_out(ddp)
    # the last buckets, which are not full, may come in another order; there is one of each type and device
    same = sorted(buckets_of(ddp, may_lay_out=False) or []) == sorted(buckets)
    return "" if same else "buckets have other sizes than at the checkpoint (bucket_cap_mb)"


def _lay_out(ddp: DistributedDataParallel) -> None:
    if ddp.reducer._rebuild_buckets():
        ddp._has_rebuilt_buckets = True  # as DDP notes it


@contextmanager
def _in_order(names: list[str]) -> Iterator[Callable[[], bool]]:
    """While this is open, a DDP that is constructed has its parameters in this order, if they are its parameters.

    Yields:
        Whether they were.
    """
    cls: Any = DistributedDataParallel
    build = cls._build_params_for_reducer
    took = False

    def in_order(ddp: DistributedDataParallel) -> tuple[list[Tensor], list[bool]]:
        nonlocal took
        parameters, sparse = build(ddp)
        named = dict(ddp.module.named_parameters())
        places = {p: i for i, p in enumerate(parameters)}
        order = [places.get(named[name]) if name in named else None for name in names]
        took = sorted(i for i in order if i is not None) == list(range(len(parameters))) and None not in order
        if not took:
            return parameters, sparse
        known = [i for i in order if i is not None]
        return [parameters[i] for i in known], [sparse[i] for i in known]

    cls._build_params_for_reducer = in_order
    try:
        yield lambda: took
    finally:
        cls._build_params_for_reducer = build


class _NoGradients(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """DDP tells its buckets only with new zeros for all gradients: make these empty, which takes no memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.zeros_like.default:
            return args[0].new_empty(0)
        return func(*args, **(kwargs or {}))
