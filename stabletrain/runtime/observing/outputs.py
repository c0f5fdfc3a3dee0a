"""The outputs of modules, and of activation functions that are called without a module, during a forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stabletrain.core.layer_names import plain_name
from stabletrain.runtime.internals import modes
from stabletrain.runtime.internals.attributes import attribute_owners, version_of
from stabletrain.runtime.internals.compiled import is_compiled, is_compiled_wrapper
from stabletrain.runtime.observing.running import RunningModules

Kind: TypeAlias = Literal["", "relu", "sigmoid", "tanh"]
"""Of a function: its zeros are read (relu), its saturated values are (sigmoid, tanh), or neither."""

_RELU = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.threshold)
_SIGMOID = (torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, F.hardsigmoid)
_TANH = (torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_)
_OTHERS = (F.gelu, F.silu, F.mish, F.hardswish, F.leaky_relu, F.elu, F.selu, F.celu, F.softplus, F.glu)
FUNCTIONS: Mapping[Any, Kind] = {
    **dict.fromkeys(_RELU, "relu"),
    **dict.fromkeys(_SIGMOID, "sigmoid"),
    **dict.fromkeys(_TANH, "tanh"),
    **dict.fromkeys(_OTHERS, ""),
}
"""The activation functions that are seen."""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Output(NamedTuple):
    """One output.

    Args:
        module: name of the module that returned it, or in whose forward pass the function was called; empty: in the
            step of the module itself.
        kind: of the function that made it.
        tensor: detached; it shares its memory with the output, so read it before the step changes it in place.
        again: it is the tensor that was reported last, with the same values: a container returns what its last part
            returned, and ``nn.ReLU`` what ``F.relu`` did. ``kind`` is then that of the last one.
        of_function: whether a function was called, and no module has returned.
    """

    module: str
    kind: Kind
    tensor: Tensor
    again: bool
    of_function: bool


class Outputs:
    """While it is open, ``see`` is called with each output of a module and of an activation function.

    Of an output with several tensors the first one with floating-point numbers is seen. Not seen are the outputs of the
    module itself, of metrics, of parametrisations, of scripted modules, and of modules within ``torch.func``, tensors
    with 8 bits or fewer, and containers that raise an error when their parts are asked for. Compiled
    modules have to run eagerly (`stabletrain.runtime.observing.look`). What is computed again in the backward pass, for
    activation checkpointing, is seen too: close it before.

    Args:
        module: whose submodules are seen.
        see: called without gradients. It may not keep the tensor.

    >>> seen = []
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> with Outputs(nn.Sequential(net), lambda output: seen.append((output.module, output.kind, output.again))):
    ...     _ = net(torch.randn(1, 2))
    >>> seen
    [('0.0', '', False), ('0.1', 'relu', False), ('0.1', 'relu', True), ('0', 'relu', True)]
    """

    def __init__(self, module: nn.Module, see: Callable[[Output], None]) -> None:
        self._see = see
        names = {each: plain_name(name) for name, each in attribute_owners(module) if _is_seen(name, each)}
        self._running = RunningModules(names, names if is_compiled(module) else None, self._left)
        self._last: tuple[weakref.ref[Tensor], int, Kind] | None = None
        self._opened: ExitStack | None = None

    def open(self) -> None:
        """See the outputs from now on, in this thread; does nothing if it is open."""
        if self._opened is not None:
            return
        self._last = None
        with ExitStack() as stack:
            self._running.follow(stack)
            stack.callback(modes.enter(_Calls(self._returned)))
            self._opened = stack.pop_all()

    def close(self) -> None:
        """See no more outputs; does nothing if it is closed."""
        opened, self._opened = self._opened, None
        self._last = None
        if opened is not None:
            opened.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _left(self, name: str, output: Any) -> None:
        try:
            tensor = _first(output)
        except Exception:  # a container of the module's own, which computes its parts, or contains itself
            return
        if tensor is not None:
            self._report(name, tensor, None)

    def _returned(self, function: Any, output: Any) -> None:
        if isinstance(output, Tensor) and _is_readable(output):
            self._report(self._running.current, output, FUNCTIONS[function])

    def _report(self, name: str, tensor: Tensor, kind: Kind | None) -> None:
        last, version = self._last, version_of(tensor)
        of_function, again = kind is not None, False
        if kind is None:
            again = last is not None and last[0]() is tensor and last[1] == version
            kind = last[2] if again and last is not None else ""
        self._last = weakref.ref(tensor), version, kind
        with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
            self._see(Output(name, kind, tensor.detach(), again, of_function))


class _Calls(TorchFunctionMode):
    """Calls a function with each activation function that was called, and what it returned."""

    def __init__(self, returned: Callable[[Any, Any], None]) -> None:
        super().__init__()
        self._returned = returned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the call; report it if it is one of the functions."""
        result = func(*args, **(kwargs or {}))
        if func in FUNCTIONS and not torch.compiler.is_compiling():
            self._returned(func, result)
        return result


def _is_seen(name: str, module: nn.Module) -> bool:
    no_layer = isinstance(module, torch.jit.ScriptModule) or is_compiled_wrapper(module)
    return bool(name) and "parametrizations" not in name.split(".") and not no_layer


def _first(output: Any) -> Tensor | None:
    """The first tensor of an output that can be read."""
    if isinstance(output, Tensor):
        return output if _is_readable(output) else None
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return next((found for each in parts if (found := _first(each)) is not None), None)


def _is_readable(tensor: Tensor) -> bool:
    return (
        tensor.dtype in _DTYPES
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_meta
        and bool(tensor.numel())
        and not modes.is_inside_transform(tensor)
    )
