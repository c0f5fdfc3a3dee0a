"""State that an optimizer keeps in attributes, in a snapshot: see `stabletrain.runtime.internals.optimizer_attributes`.

Objects keep their identity, and their attributes are set back; an attribute that came since is removed. An object whose
attributes cannot be read is copied as a whole, or refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.runtime.internals.optimizer_attributes import Found, Owner, find, is_kept
from stabletrain.runtime.snapshots.state_tree import Flattener, Kept, Restorer, SnapshotError
from stabletrain.runtime.snapshots.tensor_kinds import class_name


class OptimizerAttributes:
    """The attributes of a run's optimizers at one moment.

    Args:
        optimizers: of the run.
        model: that they train.
        flattener: takes their tensors.

    Raises:
        SnapshotError: if an object cannot be copied; the message names it.
    """

    def __init__(self, optimizers: Iterable[Optimizer], model: nn.Module, flattener: Flattener) -> None:
        found = [find(each, model) for each in optimizers]
        check_found(found)
        self._owners: list[tuple[Owner, Any]] = []
        for each in found:
            self._owners += [(owner, flattener.flatten(owner.state(), taken)) for owner in each.owners]
        self._generators: list[tuple[torch.Generator, Tensor]] = [
            (generator, generator.get_state()) for each in found for _, generator in each.generators
        ]

    def restore(self, restorer: Restorer) -> None:
        """Set the attributes back; the tensors follow when the restorer finishes."""
        for owner, node in self._owners:
            now = owner.state()
            restored = restorer.restore(node, dict(now), owner.path)
            for key in now:
                if key not in restored:
                    del owner.names[key]
            owner.names.update(restored)
        for generator, state in self._generators:
            generator.set_state(state)


def check_optimizers(optimizers: Iterable[Optimizer], model: nn.Module) -> None:
    """Raise an error if the state of an optimizer cannot be in a snapshot.

    Raises:
        SnapshotError: naming what cannot be copied.
    """
    check_found([find(each, model) for each in optimizers])


def check_found(found: Iterable[Found]) -> None:
    """As `check_optimizers`, for what `find` has found."""
    for each in found:
        for path, value in each.values:
            try:
                copy.deepcopy(value)
            except Exception as error:  # code of any class
                raise SnapshotError(
                    f"{path} is a {_name(value)}, which cannot be copied ({error}), so going "
                    "back to a snapshot would not restore it: expected numbers, tensors, containers and objects of "
                    "them in the attributes of an optimizer. Use another optimizer"
                ) from error


def taken(value: Any) -> Any:
    """For a `Flattener`: objects whose attributes a snapshot restores, and code, stay as they are; others are copied.

    Raises:
        SnapshotError: if one cannot be copied.
    """
    if is_kept(value):
        return Kept(value)
    return copied(value)


def copied(value: Any) -> Any:
    """For a `Flattener`: a copy.

    Raises:
        SnapshotError: if it cannot be copied.
    """
    try:
        return copy.deepcopy(value)
    except Exception as error:  # code of any class
        raise SnapshotError(
            f"the state of the run holds a {_name(value)}, which cannot be copied ({error}): a "
            "snapshot holds only what can be. Use another optimizer, or keep this object elsewhere"
        ) from error


def _name(value: Any) -> str:
    return class_name(type(value)).removeprefix("builtins.")
