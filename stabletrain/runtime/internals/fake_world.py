"""Tensors without memory and a process group without processes, in which a run of any size is set up in one process.

These are private parts of torch, as are the functions that are replaced here because they read values of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel, distributed
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

Replacement = tuple[Any, str, Any]
"""An object, the name of one of its attributes, and what stands there for a while."""


class NotTraceable(RuntimeError):
    """This version of torch lacks a part that is needed; the message names it."""


@contextmanager
def fake_world(processes: int, further: Iterable[Replacement] = ()) -> Iterator[Any]:
    """Within it tensors have no memory, and this process is the first of so many, whose messages go nowhere.

    Args:
        processes: of the process group.
        further: attributes to replace for this time.

    Returns:
        Torch's FakeTensorMode.

    Raises:
        NotTraceable: if torch has no such mode or process group any more.
    """
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise NotTraceable(f"torch {torch.__version__} has no {error.name}") from error
    if dist.is_initialized():
        raise RuntimeError("this process belongs to a process group already")
    with ExitStack() as stack:
        for owner, name, new in (*_replacements(), *further):
            stack.enter_context(replaced(owner, name, new))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        stack.callback(dist.destroy_process_group)
        # a module may have tensors in plain attributes, made when its class was
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


@contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Within it an attribute has another value.

    Args:
        owner: a module, a class or an object.
        name: of the attribute.
        new: the value.
    """
    own = vars(owner).get(name)
    before = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        if own is None and isinstance(owner, type):
            delattr(owner, name)
        else:
            setattr(owner, name, before if own is None else own)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one, or takes the place of an ordinary one in a fake world."""
    return type(tensor) is Tensor or is_fake(tensor)


def needs_values(error: BaseException) -> bool:
    """Whether an exception says that the value of a tensor without memory was asked for."""
    return type(error).__module__ == "torch._subclasses.fake_tensor" or "GuardOnDataDependent" in type(error).__name__


def drop_memory(mode: Any, module: nn.Module) -> None:
    """Let the parameters and buffers of a module have no memory.

    Args:
        mode: from `fake_world`, which is active.
        module: is changed in place.
    """
    convert: Callable[..., Any] = module._apply
    convert(lambda tensor: tensor if tensor.is_meta or is_fake(tensor) else mode.from_tensor(tensor))


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no memory, as in a fake world."""
    return type(tensor).__module__ == "torch._subclasses.fake_tensor"


def without_memory(mode: Any, value: Any) -> Any:
    """A copy of nested structures whose tensors have no memory.

    Args:
        mode: from `fake_world`.
        value: such as a batch.
    """
    return tree_map_only(Tensor, mode.from_tensor, value)


def with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose own tensors have memory and values also in a fake world, such as states of generators.

    Args:
        function: takes and returns no tensors of the model.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return called


def leave_out_kernels(optimizer: Optimizer) -> None:
    """Let an optimizer of bitsandbytes make its state, and not call its kernels, which write to addresses.

    Args:
        optimizer: of any kind; others are not changed.
    """
    if all(hasattr(optimizer, name) for name in ("init_state", "update_step", "get_config")):
        vars(optimizer)["update_step"] = lambda *args, **kwargs: None


def reduce_buckets(wrapped: DistributedDataParallel, found: Callable[[Tensor], None]) -> None:
    """Let DistributedDataParallel reduce its buckets by a hook that a fake process group can serve.

    Its own all-reduce returns no tensor there, and it would read the order in which gradients became ready.

    Args:
        wrapped: before its first forward.
        found: called with each bucket's tensor when it is reduced.
    """
    from torch._guards import active_fake_mode

    def hook(state: object, bucket: Any) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        found(buffer)
        dist.all_reduce(buffer)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done

    private: Any = dist
    # torch compares the annotations with the types, and here they are texts
    hook.__annotations__ = {"bucket": private.GradBucket, "return": torch.futures.Future[Tensor]}
    wrapped.register_comm_hook(None, hook)
    if active_fake_mode() is not None:
        cast(Any, wrapped).reducer = _FixedBuckets(wrapped.reducer)


def bucket_sizes(wrapped: DistributedDataParallel) -> list[int]:
    """Bytes of the buckets that DistributedDataParallel forms after its first step.

    Args:
        wrapped: whose gradients are assumed to become ready in the reverse order of its parameters.
    """
    trained = [p for p in reversed(list(wrapped.module.parameters())) if p.requires_grad]
    private: Any = dist
    first = min(private._DEFAULT_FIRST_BUCKET_BYTES, wrapped.bucket_bytes_cap)
    indices, _ = private._compute_bucket_assignment_by_size(
        trained, [first, wrapped.bucket_bytes_cap], [False] * len(trained)
    )
    return [sum(trained[i].numel() * trained[i].element_size() for i in bucket) for bucket in indices]


class _FixedBuckets:
    """A reducer that keeps its first buckets: forming others reads tensors' values."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def _replacements() -> Iterator[Replacement]:
    yield nn.Module, "_apply", _converter()
    yield distributed, "_verify_param_shape_across_processes", lambda *args, **kwargs: None
    yield DeviceMesh, "__init__", _mesh_with_values(DeviceMesh.__init__)
    yield DeviceMesh, "__getitem__", with_values(DeviceMesh.__getitem__)
    yield torch.amp.GradScaler, "_maybe_opt_step", _step_always
    yield dist, "new_group", _fake_groups(dist.new_group)
    yield dist, "_broadcast_coalesced", _broadcast_together


def _fake_groups(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make further groups as fake as the first one, whatever backend is asked for."""

    @wraps(make)
    def called(ranks: Any = None, timeout: Any = None, backend: Any = None, **kwargs: Any) -> Any:
        return make(ranks, **kwargs)

    return called


def _broadcast_together(group: Any, tensors: Iterable[Tensor], buffer_size: int, source: int = 0) -> None:
    """Torch's own function for it writes into memory that the tensors do not have."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    for same in by_dtype.values():
        dist.broadcast(torch.cat([each.flatten() for each in same]), source, group=group)


def _step_always(self: Any, optimizer: Optimizer, state: object, *args: Any, **kwargs: Any) -> Any:
    """Step without asking whether a gradient has overflowed, which is a value."""
    return optimizer.step(*args, **kwargs)


def _converter() -> Callable[..., nn.Module]:
    """``nn.Module._apply`` for parameters without memory, which torch would exchange in place, and cannot."""
    made: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, nn.Parameter]] = {}

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            inner: Callable[..., Any] = child._apply  # a module may have its own
            inner(fn)
        for key, p in self._parameters.items():
            if p is None:
                continue
            with torch.no_grad():
                new = fn(p)
            if new is not p:  # a parameter that is registered twice becomes one new one
                place = (id(p), new.dtype, new.device)
                if place not in made:
                    made[place] = (p, nn.Parameter(new, p.requires_grad))
                self._parameters[key] = made[place][1]
        for key, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[key] = fn(buffer)
        return self

    return apply


def _mesh_with_values(init: Callable[..., None]) -> Callable[..., None]:
    """Make a mesh whose numbers of ranks have values."""
    make = with_values(init)

    @wraps(init)
    def called(self: DeviceMesh, *args: Any, **kwargs: Any) -> None:
        ranks = kwargs.get("_rank_map")
        if ranks is not None:  # init_device_mesh numbers them in order
            kwargs["_rank_map"] = with_values(torch.arange)(ranks.numel(), dtype=torch.int)
        make(self, *args, **kwargs)

    return called
