"""State that an optimizer keeps outside of ``state`` and ``param_groups``: in attributes, and in objects it holds.

StableSPAM counts its steps in an attribute, SPAM has a helper object with an optimizer and a scheduler in it, wrappers
hold other optimizers in an attribute, a list or a dictionary. All of them are found by following the attributes.
Left out is what torch itself keeps in attributes of an optimizer, code, the trained model, what belongs to the whole
process (a singleton, a lock, a process group), and Lightning's own objects.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.runtime.internals.attributes import version_of

_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_LEAVES = (Tensor, *_IMMUTABLE)
_LEAF_KINDS = frozenset({nn.Parameter, *_LEAVES})
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, property, weakref.ref)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_PROCESS_WIDE = (
    "torch._C",
    "torch.cuda",
    "torch.distributed.device_mesh",
    "torch.distributed.distributed_c10d",
    "torch._dynamo",
    "threading",
    "_thread",
    "concurrent",
    "multiprocessing",
    "logging",
    "lightning",
    "pytorch_lightning",
    "stabletrain.runtime",
)
ZERO = "ZeroRedundancyOptimizer"
"""Name of the class of torch; its module takes long to import, and warns."""
_SET_BY_OTHERS = frozenset(
    {
        "step",  # torch's schedulers and the guard replace these methods on the instance
        "zero_grad",
        "_opt_called",
        "grad_scale",  # passed to a fused kernel for one step
        "found_inf",
        "_step_supports_amp_scaling",
        "_need_device_dtype_check_for_fused",
    }
)


class Owner(NamedTuple):
    """An optimizer, or an object that one holds.

    Args:
        path: from the optimizer, as ``StableSPAM.warmup``.
        thing: the object.
        names: its attributes: the dictionary itself.
        ignored: names of attributes that are no state of its own.
    """

    path: str
    thing: Any
    names: dict[str, Any]
    ignored: frozenset[str]

    def state(self) -> dict[str, Any]:
        """The attributes that may be state, by name; the values themselves."""
        return {key: value for key, value in self.names.items() if key not in self.ignored and not _is_code(value)}


class Found(NamedTuple):
    """What an optimizer is made of.

    Args:
        optimizers: itself, and those that it holds.
        owners: these, and the other objects that it holds.
        generators: random generators, each with its path.
        values: the path and value of each object whose attributes cannot be read: it can only be copied as a whole.
    """

    optimizers: list[Optimizer]
    owners: list[Owner]
    generators: list[tuple[str, torch.Generator]]
    values: list[tuple[str, Any]]


def find(optimizer: Optimizer, model: nn.Module) -> Found:
    """Follow the attributes of an optimizer.

    Args:
        optimizer: the optimizer.
        model: that it trains; its modules are left out, others that the optimizer holds are not.
    """
    found = Found([], [], [], [])
    seen: set[int] = {id(each) for each in model.modules()}
    alive: list[Any] = []  # the id of an object that is freed could be that of another one
    waiting: deque[tuple[str, Any]] = deque([(type(optimizer).__name__, optimizer)])
    while waiting:
        path, thing = waiting.popleft()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        alive.append(thing)
        waiting.extend(_visit(path, thing, found))
    return found


def _visit(path: str, thing: Any, found: Found) -> Iterable[tuple[str, Any]]:
    """Add an object to what was found; the values in it, each with its path."""
    if isinstance(thing, dict):
        # the state of a parameter is usually a dictionary of leaves, and there may be thousands
        return [(f"{path}[{_key(key)}]", each) for key, each in thing.items() if not _holds_nothing(each)]
    if isinstance(thing, _CONTAINERS) and _is_plain_container(thing):
        return [(f"{path}[{i}]", each) for i, each in enumerate(thing) if not isinstance(each, _LEAVES)]
    if isinstance(thing, types.MethodType):
        return [(path, thing.__self__)]
    if isinstance(thing, functools.partial):
        return [(path, each) for each in (thing.func, thing.args, thing.keywords)]
    if isinstance(thing, torch.Generator):
        found.generators.append((path, thing))
    elif isinstance(thing, Optimizer):
        found.optimizers.append(thing)
        if any(
            base.__name__ == ZERO for base in type(thing).__mro__
        ):  # besides the optimizer of its shard it holds caches, and copies of all shards
            return [(f"{path}.{key}", each) for key, each in vars(thing).items() if isinstance(each, Optimizer)]
        return _attributes(Owner(path, thing, vars(thing), _of_optimizers()), found)
    elif not stays(thing):
        if _has_only_attributes(thing):
            return _attributes(Owner(path, thing, vars(thing), frozenset()), found)
        found.values.append((path, thing))
    return ()


def _attributes(owner: Owner, found: Found) -> list[tuple[str, Any]]:
    found.owners.append(owner)
    left_out = owner.ignored - {"state"}  # an optimizer's state may hold objects, too
    values = ((key, each) for key, each in owner.names.items() if key not in left_out)
    return [(f"{owner.path}.{key}", each) for key, each in values if not isinstance(each, _LEAVES)]


def stays(thing: Any) -> bool:
    """Whether a value is no state of an optimizer, or one that other code has to keep."""
    if isinstance(thing, _LEAVES) or _is_code(thing):
        return True
    package = type(thing).__module__
    return any(package == each or package.startswith(f"{each}.") for each in _PROCESS_WIDE) or _is_shared(thing)


def is_kept(thing: Any) -> bool:
    """Whether an object keeps its identity: its attributes are set back, or it is not touched at all."""
    return (
        isinstance(thing, (torch.Generator, Optimizer, nn.Module, types.MethodType, functools.partial))
        or stays(thing)
        or _has_only_attributes(thing)
    )


def is_data(thing: Any) -> bool:
    """Whether a value is a tensor, a number, a text or a container, and not an object that has attributes."""
    return isinstance(thing, (*_LEAVES, *_CONTAINERS)) or not is_kept(thing)


class Fingerprint:
    """Whether a step of an optimizer changes anything that the host can see without waiting for a device.

    These are the version counters of its parameters and tensors, and plain numbers and texts.

    Args:
        optimizer: the optimizer.
        model: that it trains.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self._optimizer, self._model = optimizer, model
        self._marks = list(self._now())

    def has_changed(self) -> bool:
        """Whether it is another one now."""
        return self._marks != list(self._now())

    def _now(self) -> Iterator[Any]:
        found = find(self._optimizer, self._model)
        for each in found.optimizers:
            yield from marks_of(getattr(each, "state", None))
            yield from marks_of(getattr(each, "param_groups", None))
        for owner in found.owners:
            yield from marks_of(owner.state())


def marks_of(value: Any) -> Iterator[Any]:
    """What changes when a value does, without reading tensors: their version counters, and plain values."""
    if isinstance(value, Tensor):
        yield id(value), version_of(value)
    elif isinstance(value, dict):
        yield len(value)
        for each in value.values():
            yield from marks_of(each)
    elif isinstance(value, list | tuple | deque):
        yield len(value)
        for each in value:
            yield from marks_of(each)
    elif isinstance(value, _IMMUTABLE):
        yield (repr(value),) if isinstance(value, float | complex) else value  # a NaN equals itself
    else:
        yield id(value)


def _holds_nothing(thing: Any) -> bool:
    """Whether a value is a leaf, or a dictionary of leaves."""
    return isinstance(thing, _LEAVES) or (type(thing) is dict and _LEAF_KINDS.issuperset(map(type, thing.values())))


def _is_code(thing: Any) -> bool:
    return isinstance(thing, _CODE) or type(thing).__name__ == "method-wrapper"


def _is_plain_container(thing: Any) -> bool:
    return type(thing) in _CONTAINERS or (isinstance(thing, tuple) and hasattr(thing, "_fields"))


def _is_shared(thing: Any) -> bool:
    """Whether a class or a module holds this object: then it is the whole process's, and not this optimizer's."""
    kind = type(thing)
    holders: Collection[Any] = [*(vars(base) for base in kind.__mro__), vars(sys.modules.get(kind.__module__, object))]
    return any(each is thing for holder in holders for each in list(holder.values()))


def _has_only_attributes(thing: Any) -> bool:
    """Whether an object is nothing but its attributes."""
    kind = type(thing)
    if not hasattr(thing, "__dict__") or isinstance(thing, (*_CONTAINERS, int, float, str, bytes)):
        return False
    if any("__slots__" in vars(base) and vars(base)["__slots__"] for base in kind.__mro__):
        return False
    reduces: list[Callable[..., Any]] = [kind.__reduce__, kind.__reduce_ex__]
    return isinstance(thing, nn.Module) or reduces == [object.__reduce__, object.__reduce_ex__]


def _key(key: Any) -> str:
    return "a parameter" if isinstance(key, Tensor) else repr(key)


@functools.cache
def _of_optimizers() -> frozenset[str]:
    """The attributes that torch gives to every optimizer."""
    plain = Optimizer([nn.Parameter(torch.zeros(1))], {})
    return frozenset({*vars(plain), *_SET_BY_OTHERS})
