"""The depth of each parameter, for learning rates that decay from the output of a model towards its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from stabletrain.errors import UserError
from stabletrain.optim.kinds import NamedTensor, plain_name

_CLEARLY_LARGER = 2.0
"""A list of blocks is taken if it has so many times the elements of the next one."""


@dataclass(frozen=True)
class Layers:
    """A list of blocks in a module, with the depth of every parameter.

    Args:
        path: name of the list, such as ``net.blocks``.
        count: number of blocks.
        depths: by the parameter's first name: 0 for embeddings and what the module has before the list, 1 to ``count``
            for the blocks, ``count`` + 1 for what it has after them.
    """

    path: str
    count: int
    depths: Mapping[str, int]

    def scale(self, name: str, decay: float) -> float:
        """The factor on a parameter's learning rate: decay ** (count + 1 - depth).

        Args:
            name: the parameter's first name.
            decay: factor per layer, 0 < decay <= 1.
        """
        return float(decay ** (self.count + 1 - self.depths[name]))


def find_layers(module: nn.Module, tensors: Sequence[NamedTensor], path: str | None, key: str) -> Layers:
    """Find the list of blocks: the ModuleList or Sequential of one class of blocks with the most elements.

    Args:
        module: the module.
        tensors: its parameters.
        path: name of the list; None: the one that clearly has the most elements.
        key: config key of ``path``, for messages.

    Raises:
        UserError: if there is no such list, or several are similarly large.
    """
    lists = {plain_name(name): each for name, each in module.named_modules() if _is_list(each)}
    outer = {name: each for name, each in lists.items() if not _is_below(name, lists) and _is_uniform(each)}
    if path is None:
        path = _largest(outer, key)
    elif path not in lists:
        known = ", ".join(outer) or "none"
        raise UserError(f"{key}: expected the name of a list of blocks, got {path!r}; found in the model: {known}")
    depths: dict[str, int] = {}
    count = len(lists[path])
    seen = False
    for each in tensors:
        inside = [name for name in each.names if name.startswith(f"{path}.")]
        if inside:
            seen = True
            depths[each.name] = _position(inside[0].removeprefix(f"{path}.").split(".")[0], lists[path]) + 1
        elif each.kind == "embedding" or not seen:
            depths[each.name] = 0
        else:
            depths[each.name] = count + 1
    return Layers(path, count, depths)


def _is_list(module: nn.Module) -> bool:
    least = 1 if isinstance(module, nn.ModuleList) else 2
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) >= least


def _is_uniform(module: nn.Module) -> bool:
    """Whether all elements are of one class, and have parameters."""
    blocks = list(module.children())
    return len({type(each) for each in blocks}) == 1 and all(_elements(each) for each in blocks)


def _is_below(name: str, lists: Mapping[str, nn.Module]) -> bool:
    return any(name.startswith(f"{other}.") for other, each in lists.items() if other != name and _is_uniform(each))


def _position(name: str, blocks: nn.Module) -> int:
    return [each for each, _ in blocks.named_children()].index(name)


def _largest(lists: Mapping[str, nn.Module], key: str) -> str:
    sizes = sorted(((_elements(each), name) for name, each in lists.items()), reverse=True)
    if not sizes:
        raise UserError(
            f"{key}: layer-wise decay needs a ModuleList or Sequential of blocks of one class, and the model has none; "
            "remove layer_decay, or set rates with overrides"
        )
    if len(sizes) > 1 and sizes[0][0] < _CLEARLY_LARGER * sizes[1][0]:
        names = ", ".join(name for _, name in sizes)
        raise UserError(
            f"{key}: layer-wise decay needs one list of blocks, and the model has several of similar size: {names}; "
            "set it to one of these"
        )
    return sizes[0][1]


def _elements(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())
