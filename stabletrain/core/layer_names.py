"""The layers of a model: modules and parameters by the beginning of their names."""

from __future__ import annotations

from collections.abc import Sequence

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Name parts that torch.compile, FSDP and activation checkpointing insert."""


def layer_names(parameters: Sequence[str], depth: int | None) -> list[str]:
    """The layer of each parameter: the beginning of its module's name.

    Levels that all modules share (``model.``) are part of the name but not counted, and an index counts with its list
    (``blocks.3`` is one level). A parameter of the common parent module itself is a layer by itself.

    Args:
        parameters: names as in `torch.nn.Module.named_parameters`.
        depth: levels of modules, >= 1; None: all of them.

    >>> layer_names(["model.wte.weight", "model.blocks.0.mlp.up.weight", "model.blocks.0.mlp.up.bias"], depth=1)
    ['model.wte', 'model.blocks.0', 'model.blocks.0']
    """
    names = [plain_name(name) for name in parameters]
    paths = [_levels(name.split(".")[:-1]) for name in names]
    shared = _shared(paths)
    end = None if depth is None else shared + depth
    return [".".join(path[:end]) if len(path) > shared else name for name, path in zip(names, paths, strict=True)]


class ModuleLayers:
    """The layers of modules, named as `layer_names` names those of their parameters.

    Args:
        parameters: names of all parameters of the model.
        depth: levels of modules, >= 1; None: every module is a layer.

    >>> layers = ModuleLayers(["net.wte.weight", "net.blocks.0.up.weight"], depth=1)
    >>> layers.of("net.blocks.0.act"), layers.of("net"), layers.is_above("net")
    ('net.blocks.0', 'net', True)
    """

    def __init__(self, parameters: Sequence[str], depth: int | None) -> None:
        shared = _shared([_levels(plain_name(name).split(".")[:-1]) for name in parameters])
        self._end = None if depth is None else shared + depth
        layers = [self.of(name.rpartition(".")[0]).split(".") for name in parameters]
        self._above = {".".join(parts[:end]) for parts in layers for end in range(1, len(parts))}

    def of(self, module: str) -> str:
        """The layer of a module, by its name."""
        return ".".join(_levels(plain_name(module).split("."))[: self._end])

    def is_above(self, module: str) -> bool:
        """Whether a module contains layers."""
        return plain_name(module) in self._above


def plain_name(name: str) -> str:
    """A name of a module or parameter without the parts that wrappers insert.

    >>> plain_name("net._orig_mod.head.weight")
    'net.head.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """The number of levels that all modules with parameters have in common."""
    same = [len(set(level)) == 1 for level in zip(*paths, strict=False)]
    shared = [*same, False].index(False)
    if all(len(path) == shared for path in paths):
        shared = max(0, shared - 1)  # one module alone: it is the layer
    return shared


def _levels(parts: Sequence[str]) -> list[str]:
    """The levels of modules; an index is part of the level before it."""
    levels: list[str] = []
    before = ""
    for part in parts:
        if part.isdigit() and levels and not before.isdigit():
            levels[-1] += f".{part}"
        else:
            levels.append(part)
        before = part
    return levels
