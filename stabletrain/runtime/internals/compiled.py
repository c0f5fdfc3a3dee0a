"""Whether torch.compile compiles a module: torch and Lightning keep that in private attributes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule


def is_compiled(module: nn.Module) -> bool:
    """Whether a module, a part of it, or a function in an attribute of one of them was given to torch.compile.

    A function that the module calls without having it as an attribute is not seen.

    Args:
        module: of a fit; Lightning replaces the steps of a module that was compiled as a whole.
    """
    return any(_is_compiled(each) for each in module.modules())


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile(module)`` returns, around the module itself."""
    return isinstance(module, OptimizedModule)


def uses_cuda_graphs(module: nn.Module) -> bool:
    """Whether a module, or a part of it, was compiled so that inductor replays CUDA graphs (``"reduce-overhead"``).

    Args:
        module: of a fit.
    """
    return any(_is_replayed(each) for each in module.modules())


def _is_replayed(module: nn.Module) -> bool:
    contexts = [module.__dict__.get("dynamo_ctx"), (module.__dict__.get("_compiler_ctx") or {}).get("dynamo_ctx")]
    configs = [getattr(each, "compiler_config", None) for each in contexts]
    compiled = [module._compiled_call_impl, *(each for each in _attributes(module) if _is_compiled_function(each))]
    for function in compiled:
        read = getattr(getattr(function, "__func__", function), "get_compiler_config", None)
        configs.append(read() if callable(read) else None)
    return any(isinstance(each, Mapping) and bool(each.get("triton.cudagraphs")) for each in configs)


def _is_compiled(module: nn.Module) -> bool:
    if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
        return True
    # of Lightning: set by Trainer.fit(torch.compile(module))
    if module.__dict__.get("_compiler_ctx") is not None:
        return True
    return any(_is_compiled_function(each) for each in _attributes(module))


def _attributes(module: nn.Module) -> Iterator[Any]:
    yield from module.__dict__.values()
    for kind in type(module).__mro__:
        if kind is not nn.Module and not kind.__module__.startswith(("torch.", "lightning.", "pytorch_lightning.")):
            yield from vars(kind).values()


def _is_compiled_function(value: Any) -> bool:
    value = getattr(value, "__func__", value)  # of a static method
    if not callable(value) or isinstance(value, nn.Module | type):
        return False
    # torch.compiler.disable leaves the first attribute, too
    attributes = getattr(value, "__dict__", None) or {}
    return "_torchdynamo_orig_callable" in attributes and not attributes.get("_torchdynamo_disable")
