"""What a script trains, as short texts that a checkpoint keeps: another script would not go on from it unnoticed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import xxhash
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from stabletrain.runtime.checkpoints.manifest import TRAINED_LIMIT
from stabletrain.runtime.checkpoints.names import plain_name
from stabletrain.runtime.internals.shards import class_name
from stabletrain.runtime.internals.state import divides_state

_OF_THE_KERNEL = ("foreach", "fused", "capturable", "differentiable")
"""Arguments of optimizers that choose how a step is computed."""
_OF_A_GROUP = ("params", "param_names", "initial_lr", *_OF_THE_KERNEL)


def describe_model(module: LightningModule) -> dict[str, str]:
    """The class of a module, and the names and whole shapes of its parameters; the same under each strategy.

    Args:
        module: whose parameters exist; not the one that torch.compile has wrapped it in.
    """
    total, count, checksum = 0, 0, xxhash.xxh3_64()
    for name, p in module.named_parameters():
        shape = "?" if is_lazy(p) else str(list(p.shape))
        total, count = total + (0 if is_lazy(p) else p.numel()), count + 1
        checksum.update(f"{plain_name(name)} {shape}\n".encode())
    text = f"{count} tensors, {total} numbers, checksum {checksum.hexdigest()} of names and shapes"
    return {"model": class_name(module), "parameters": text}


def describe_training(module: LightningModule, optimizers: list[Optimizer], schedulers: list[Any]) -> dict[str, str]:
    """The types of a module's parameters, the seed, the optimizers with arguments and groups, and the schedulers.

    Lengths (``max_steps``) are left out, so that a run may be continued for longer; so are the arguments of schedulers,
    which often are lengths, and how a step is computed (``fused``).

    Args:
        module: as for `describe_model`.
        optimizers: as the module has made them, before a state was loaded.
        schedulers: of the module.
    """
    types = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()})
    found = {"types of the parameters": ", ".join(types)}
    if seed := os.environ.get("PL_GLOBAL_SEED"):  # of seed_everything
        found["seed"] = seed
    for i, optimizer in enumerate(optimizers):
        found |= _describe(optimizer, "optimizer" if len(optimizers) == 1 else f"optimizer {i}")
    if schedulers:
        found["schedulers"] = ", ".join(type(each).__name__ for each in schedulers)
    return {key: value[:TRAINED_LIMIT] for key, value in found.items()}


def differences(saved: Mapping[str, str], mine: Mapping[str, str]) -> list[str]:
    """What differs between two descriptions, as far as both were made of the same things; of a class only its name.

    Args:
        saved: of a checkpoint.
        mine: of this script.

    >>> differences({"model": "Net", "optimizer lr": "0.1"}, {"model": "Net", "optimizer lr": "0.2"})
    ['optimizer lr: 0.1 in the checkpoint, 0.2 now']
    >>> differences({"optimizer": "SGD", "optimizer momentum": "0.9"}, {"optimizer": "Adam", "optimizer eps": "1e-08"})
    ['optimizer: SGD in the checkpoint, Adam now']
    """
    names = [*mine, *(name for name in saved if name not in mine)]
    different = [name for name in names if saved.get(name) != mine.get(name)]
    return [
        f"{name}: {saved.get(name, 'none')} in the checkpoint, {mine.get(name, 'none')} now"
        for name in different
        if not any(name.startswith(f"{other} ") for other in different)
    ]


def _describe(outer: Optimizer, name: str) -> Iterator[tuple[str, str]]:
    inner: Optimizer = outer.optim if divides_state(outer) else outer  # type: ignore[attr-defined]
    yield name, type(inner).__name__
    defaults = {key: text for key, value in inner.defaults.items() if (text := _text(value)) is not None}
    for key, text in defaults.items():
        if key not in _OF_THE_KERNEL:
            yield f"{name} {key}", text
    groups = []
    for group in outer.param_groups:
        first = {**group, "lr": group.get("initial_lr", group.get("lr"))}  # a scheduler has changed lr already
        own = {key: _text(value) for key, value in first.items() if key not in _OF_A_GROUP}
        special = [f"{key}={text}" for key, text in own.items() if text is not None and text != defaults.get(key)]
        groups.append(f"{len(group['params'])} tensors" + (f" with {', '.join(special)}" if special else ""))
    yield f"{name} groups", "; ".join(groups)


def _text(value: Any) -> str | None:
    """A plain value as text; None for others, of which the text may differ from start to start."""
    if isinstance(value, Tensor):
        return repr(value.item()) if value.numel() == 1 and not value.is_meta else None
    if isinstance(value, list | tuple):
        parts = [_text(each) for each in value]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    return repr(value) if isinstance(value, bool | int | float | str | None) else None
