"""Collect a checkpoint of a run whose model or optimizer is divided among the processes, without gathering tensors.

Tensors have the model's parameter names, also those of the optimizer's state, so a checkpoint knows neither the number
of processes nor the strategy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.names import parameter_names, plain_name
from stabletrain.runtime.checkpoints.parts import Part
from stabletrain.runtime.checkpoints.regions import region_of, whole
from stabletrain.runtime.internals import dividing, shards
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.packages import both
from stabletrain.runtime.internals.state import divides_state
from stabletrain.runtime.ranks import Ranks
from stabletrain.runtime.snapshots.tensor_kinds import class_name, is_plain


def divides_with_dtensors(trainer: Trainer) -> bool:
    """Whether the strategy divides the model among processes with DTensors (FSDP2, tensor parallel)."""
    return isinstance(trainer.strategy, both(ModelParallelStrategy))


def is_divided(trainer: Trainer) -> bool:
    """Whether each process has a part of the model or of the optimizer's state.

    Args:
        trainer: in a fit; its strategy has set up model and optimizers.
    """
    if divides_with_dtensors(trainer):
        return True
    return trainer.world_size > 1 and any(divides_state(each) for each in trainer.optimizers)


def collected(trainer: Trainer, divided: bool) -> dict[str, Any]:
    """The state of a run, for a checkpoint or a copy in memory. A collective.

    Args:
        trainer: in a fit, between two batches.
        divided: whether the strategy divides the model among the processes.
    """
    return collect(trainer) if divided else trainer_internals.dump_checkpoint(trainer)


def collect(trainer: Trainer) -> dict[str, Any]:
    """The content of a checkpoint, as Lightning collects it, with a `Part` for each tensor of model and optimizers.

    Optimizer states are by parameter name; those that other processes hold are included, without elements. Tensors are
    not copied. A collective.

    Args:
        trainer: in a fit, between two batches.

    Raises:
        CheckpointError: on all processes, if the state of one of them cannot be stored.
    """
    module = trainer_internals.unwrapped(trainer.lightning_module)
    shards.reshard(module)
    names = parameter_names(module)
    states = {id(each): f"optimizer_states.{i}" for i, each in enumerate(trainer.optimizers)}

    def optimizer_state(optimizer: Any) -> dict[str, Any]:
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        return _optimizer_state(optimizer, names, states[id(optimizer)])

    problem = ""
    with dividing.collecting_states(trainer, module.state_dict, optimizer_state):
        checkpoint = trainer_internals.dump_checkpoint(trainer)
    try:
        checkpoint["state_dict"] = _model_state(checkpoint["state_dict"], module)
    except CheckpointError as error:
        problem = str(error)
    problem = next((each for each in Ranks(trainer).gather(problem) if each), "")
    if problem:
        raise CheckpointError(problem)
    for i, optimizer in enumerate(trainer.optimizers):
        if divides_state(optimizer) and trainer.world_size > 1:
            _add_others(checkpoint["optimizer_states"][i], Ranks(trainer))
    return checkpoint


def parts_of(value: Any) -> Iterator[Part]:
    """The parts in a nested state, without repetition."""
    seen: set[int] = set()
    for each in _leaves(value):
        if isinstance(each, Part) and id(each) not in seen:
            seen.add(id(each))
            yield each


def part_of(name: str, tensor: Tensor) -> Part:
    """What this process holds of a tensor.

    Args:
        name: in the checkpoint.
        tensor: a plain one, which this process holds all of, or a DTensor.

    Raises:
        CheckpointError: for a DTensor whose parts are not plain tensors.
    """
    if not isinstance(tensor, DTensor):
        return Part(name, tensor.dtype, tuple(tensor.shape), whole(tensor.shape), tensor.detach())
    local = tensor.to_local().detach()
    if not is_plain(local):
        raise CheckpointError(
            f"checkpoint: {name} is a DTensor whose parts are tensors of class {class_name(type(local))}, which cannot "
            "be divided anew for another number of processes. Use an optimizer with 32-bit state, or Lightning's "
            "ModelCheckpoint (plugins/checkpoints=none)"
        )
    try:
        region = region_of(shards.held_indices(tensor))
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {name} is {error}; only parts of the whole can be stored") from None
    return Part(name, tensor.dtype, tuple(tensor.shape), region, local)


def _model_state(state: Mapping[str, Any], module: LightningModule) -> Mapping[str, Any]:
    """Parameters, and other DTensors, as parts. Plain buffers stay as they are: those of rank 0 are written."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    known: dict[int, Part] = {}  # a parameter with several names is written once
    found: dict[str, Any] = type(state)()  # type: ignore[assignment]
    for key, value in state.items():
        own, name = parameters.get(key), plain_name(key)
        if isinstance(value, DTensor) or (isinstance(value, Tensor) and own is not None and is_plain(value)):
            part = known.get(id(own)) if own is not None else None
            if part is None:
                part = part_of(f"state_dict.{name}", value)
                known[id(own)] = part
            found[name] = part
        else:
            found[name] = value
    if (metadata := getattr(state, "_metadata", None)) is not None:
        found._metadata = metadata  # type: ignore[attr-defined]
    return found


def _optimizer_state(optimizer: Optimizer, names: Mapping[Tensor, str], path: str) -> dict[str, Any]:
    """The ``state_dict`` of an optimizer with parameter names in place of numbers, and parts in place of tensors."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    keys = [names.get(p, i) for i, p in enumerate(parameters)]
    state: dict[str, Any]
    if divides_state(optimizer):
        own = optimizer.optim.state  # type: ignore[attr-defined]
        numbers = {p: i for i, p in enumerate(parameters)}
        groups = [{**group, "params": [numbers[p] for p in group["params"]]} for group in optimizer.param_groups]
        state = {"state": {i: own[p] for i, p in enumerate(parameters) if p in own}, "param_groups": groups}
    else:
        state = optimizer.state_dict()
        if not isinstance(state.get("state"), dict) or not isinstance(state.get("param_groups"), list):
            raise CheckpointError(
                f"checkpoint: the state_dict of the optimizer {type(optimizer).__name__} has no state by parameter and "
                "no param_groups, so it cannot be stored by parameter name"
            )
    named: dict[Any, Any] = {}
    for number, values in state["state"].items():
        key = keys[number] if type(number) is int and number < len(keys) else number
        named[key] = _as_parts(values, f"{path}.state.{key}")
    renamed = [{**group, "params": [keys[number] for number in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": named, "param_groups": renamed}


def _as_parts(value: Any, path: str) -> Any:
    if isinstance(value, DTensor) or (isinstance(value, Tensor) and is_plain(value)):
        return part_of(path, value)
    if type(value) is dict:
        return {key: _as_parts(each, f"{path}.{key}") for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_as_parts(each, f"{path}.{i}") for i, each in enumerate(value))
    return value


def _add_others(state: dict[str, Any], ranks: Ranks) -> None:
    """Add the states of the parameters that belong to other processes, in the order of the groups. A collective."""
    everyone: dict[Any, Any] = {}
    for rank, others in enumerate(ranks.gather(_map(state["state"], _without_elements))):
        mine = rank == dist.get_rank()
        everyone.update(state["state"] if mine else others)
    order = [key for group in state["param_groups"] for key in group["params"]]
    state["state"] = {key: everyone[key] for key in order if key in everyone}


def _without_elements(part: Part) -> Part:
    return dataclasses.replace(part, local=None)


def _map(value: Any, change: Callable[[Part], Part]) -> Any:
    if isinstance(value, Part):
        return change(value)
    if type(value) is dict:
        return {key: _map(each, change) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map(each, change) for each in value)
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _leaves(each)
    elif type(value) in (list, tuple):
        for each in value:
            yield from _leaves(each)
    else:
        yield value
