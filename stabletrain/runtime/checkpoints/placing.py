"""Which parts of a checkpoint a process needs whose model is divided, and the DTensors that are made of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stabletrain.runtime.checkpoints.names import parameter_names, plain_name
from stabletrain.runtime.checkpoints.regions import Region, boxes, region_of, sizes, view
from stabletrain.runtime.checkpoints.tensor_file import Kind
from stabletrain.runtime.internals import shards


class Target(NamedTuple):
    """What becomes of a tensor that is read.

    Args:
        region: the elements that are needed.
        build: makes the tensor of the checkpoint from them.
    """

    region: Region
    build: Callable[[Tensor], Tensor]


Place: TypeAlias = Callable[[Any, Sequence[Kind]], Mapping[int, Target]]
"""From the tree of a state file and the kinds of its tensors, by number the tensors of which a part is needed."""


def places_of(module: nn.Module, optimizers: Sequence[Optimizer]) -> Place:
    """What this process needs of a checkpoint.

    Args:
        module: divided among the processes.
        optimizers: of the fit; none if only the weights are restored.
    """
    live = {plain_name(name): tensor for name, tensor in live_tensors(module).items()}
    keys = [_by_key(optimizer, module) for optimizer in optimizers]

    def place(tree: Any, kinds: Sequence[Kind]) -> dict[int, Target]:
        found: dict[int, Target] = {}
        entries = dict(_entries(tree))
        for name, node in _entries(entries.get("state_dict")):
            _add(found, node, kinds, live.get(plain_name(name)) if isinstance(name, str) else None)
        states = entries.get("optimizer_states")
        for by_key, state in zip(keys, states if isinstance(states, list) else [], strict=False):
            for key, values in _entries(dict(_entries(state)).get("state")):
                for _, node in _entries(values):
                    _add(found, node, kinds, by_key.get(key) if type(key) in (int, str) else None)
        return found

    return place


def placed(value: Any, like: Tensor) -> Any:
    """A whole tensor as what the process needs of it: of a DTensor's shape, its part; anything else as it is.

    Args:
        value: anything.
        like: the parameter or buffer that it belongs to.
    """
    is_whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
    if not is_whole or not isinstance(like, DTensor) or not value.dim() or value.shape != like.shape:
        return value
    region = region_of(shards.held_indices(like))
    local = value.new_empty(sizes(region))
    for box, at in boxes(region):
        view(local, (0,) * local.dim(), at).copy_(view(value, (0,) * value.dim(), box))
    return shards.like(like, local)


def live_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _by_key(optimizer: Optimizer, module: nn.Module) -> dict[Any, Tensor]:
    """The parameters of an optimizer, by number, as in an ordinary ``state_dict``, and by name."""
    names = parameter_names(module)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {**dict(enumerate(parameters)), **{names[p]: p for p in parameters if p in names}}


def _add(found: dict[int, Target], node: Any, kinds: Sequence[Kind], like: Tensor | None) -> None:
    number = node.get("T") if isinstance(node, dict) and len(node) == 1 else None
    if type(number) is not int or not 0 <= number < len(kinds) or number in found or not isinstance(like, DTensor):
        return
    if like.dim() and kinds[number].shape == tuple(like.shape):
        found[number] = Target(region_of(shards.held_indices(like)), functools.partial(shards.like, like))


def _entries(node: Any) -> Iterator[tuple[Any, Any]]:
    """The entries of a dictionary in a tree; none if it is anything else."""
    pairs = (node.get("d") or node.get("o")) if isinstance(node, dict) else None
    for pair in pairs if isinstance(pairs, list) else []:
        if isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int):
            yield pair[0], pair[1]
