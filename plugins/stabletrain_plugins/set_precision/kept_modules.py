"""Modules that compute in fp32 while the rest computes in a lower precision: found by name or class, and wrapped."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from stabletrain.errors import UserError
from stabletrain.runtime.internals.forward import wrap_forward
from stabletrain.settings import worded

_HALF = (torch.float16, torch.bfloat16)
_COMPILED = "_orig_mod."


class Kept(NamedTuple):
    """A module that is kept in fp32.

    Args:
        name: in the LightningModule.
        module: the module.
        entry: of ``keep_fp32``, by which it was found.
    """

    name: str
    module: nn.Module
    entry: str


def find(root: nn.Module, entries: Sequence[str]) -> list[Kept]:
    """The modules that entries of ``keep_fp32`` choose, without those inside another one.

    Args:
        root: the LightningModule.
        entries: names of modules, patterns of names such as ``net.blocks.*.norm``, or names of classes, with or without
            their module; a subclass is found by the name of its base class.

    Raises:
        UserError: if an entry chooses nothing.
    """
    names = {name.replace(_COMPILED, ""): module for name, module in root.named_modules() if name}
    chosen: dict[int, Kept] = {}
    for entry in entries:
        found = [(name, each) for name, each in names.items() if name == entry or fnmatch.fnmatchcase(name, entry)]
        found = found or [(name, each) for name, each in names.items() if entry in _class_names(each)]
        if not found:
            classes = {type(each).__name__ for each in names.values()}
            near = get_close_matches(entry, [*names, *classes], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                worded(
                    f"SetPrecision: keep_fp32: {entry!r} is neither the name of a module or a pattern of names, nor "
                    f"the class of one{hint} (config key precision.keep_fp32). Classes here: "
                    f"{', '.join(sorted(classes)[:12])}"
                )
            )
        for name, each in found:
            chosen.setdefault(id(each), Kept(name, each, entry))
    inside = {id(inner) for each in chosen.values() for inner in each.module.modules() if inner is not each.module}
    return [each for key, each in chosen.items() if key not in inside]


def _class_names(module: nn.Module) -> set[str]:
    """The names of a module's class and of its base classes, as they are imported."""
    found = set()
    for each in type(module).__mro__:
        if issubclass(each, nn.Module) and each is not nn.Module:
            found |= {each.__name__, f"{each.__module__}.{each.__qualname__}"}
            if getattr(nn, each.__name__, None) is each:
                found |= {f"nn.{each.__name__}", f"torch.nn.{each.__name__}"}
    return found


class KeptModules:
    """Wraps the ``forward`` of modules: autocast is off in it, and inputs are cast to fp32.

    Args:
        kept: the modules.
        device: type of the device.
        outside: dtype of the parameters of all other modules, to which outputs are cast; None: under autocast, which
            casts them itself where it has to.
    """

    def __init__(self, kept: Sequence[Kept], device: str, outside: torch.dtype | None) -> None:
        self.kept = list(kept)
        self._called: set[str] = set()
        self._undo: list[Callable[[], None]] = []
        for name, module, _ in self.kept:
            self._wrap(name, module, device, outside)

    def _wrap(self, name: str, module: nn.Module, device: str, outside: torch.dtype | None) -> None:
        called = self._called

        def around(_: nn.Module, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            called.add(name)
            args, kwargs = _cast(args, torch.float32, *_HALF), _cast(kwargs, torch.float32, *_HALF)
            default = contextlib.nullcontext() if outside is None else _default_dtype(torch.float32)
            with torch.autocast(device, enabled=False), default:
                output = inner(*args, **kwargs)
            return output if outside is None else _cast(output, outside, torch.float32)

        self._undo.append(wrap_forward(module, around))

    @property
    def uncalled(self) -> list[str]:
        """Modules whose ``forward`` was never called: what they do is done by others, with their parameters."""
        return [each.name for each in self.kept if each.name not in self._called]

    def remove(self) -> None:
        """Restore every ``forward``."""
        while self._undo:
            self._undo.pop()()

    def table(self) -> list[str]:
        """One line for each module: name, class, parameters, and why."""
        rows = [("module", "class", "parameters", "kept by")]
        for name, module, entry in self.kept:
            count = sum(p.numel() for p in module.parameters())
            rows.append((name, type(module).__name__, f"{count:,}", entry))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


@contextlib.contextmanager
def unconverted(root: nn.Module, kept: Sequence[Kept]) -> Iterator[None]:
    """Within it the module may be cast to another dtype: parameters and buffers of kept modules stay as they are.

    They are never rounded, so that a checkpoint is read back exactly.

    Args:
        root: the LightningModule.
        kept: in it.

    Raises:
        UserError: if a kept module shares a parameter with one that is cast.
    """
    owned = {id(p) for each in kept for p in each.module.parameters()}
    inner = {id(module) for each in kept for module in each.module.modules()}
    for name, module in root.named_modules():
        shared = [key for key, p in module.named_parameters(recurse=False) if id(p) in owned]
        if id(module) not in inner and shared:
            raise UserError(
                worded(
                    f"SetPrecision: keep_fp32: {name or type(module).__name__}.{shared[0]} is also a parameter of a "
                    "module that is kept in fp32, and a parameter has one dtype: keep both modules, or none (config "
                    "key precision.keep_fp32)"
                )
            )
    parameters = [(p, p.data) for each in kept for p in each.module.parameters()]
    modules = [module for each in kept for module in each.module.modules()]
    buffers = [(module, key, b) for module in modules for key, b in module.named_buffers(recurse=False)]
    yield
    for parameter, data in parameters:
        parameter.data = data
    for module, key, buffer in buffers:
        setattr(module, key, buffer)


def _cast(data: Any, dtype: torch.dtype, *of: torch.dtype) -> Any:
    return apply_to_collection(data, Tensor, lambda each: each.to(dtype) if each.dtype in of else each)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
