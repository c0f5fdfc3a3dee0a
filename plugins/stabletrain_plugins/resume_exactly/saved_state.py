"""What `ResumeExactly` saves for each rank, read from a checkpoint of any content."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stabletrain.runtime import rng
from stabletrain.runtime.data import epoch_state
from stabletrain.runtime.data.loads import Loading
from stabletrain.runtime.data.position import LoaderState, of_another_world
from stabletrain.runtime.hidden.plain import from_plain
from stabletrain.runtime.internals.resuming import BatchCount
from stabletrain_plugins.resume_exactly import optimizer_state, trained


class SavedState(NamedTuple):
    """The state of one rank.

    Args:
        rng: the global generators; None: they are not restored.
        positions: in the train loaders.
        loads: when the loaders were loaded.
        unfinished: the batches before the optimizer step that was in progress, to which all else belongs; None: the
            checkpoint was saved between two steps.
        buffers: of the module at that point, by name, if the step has changed them.
        epoch: what the epoch had gathered; None in checkpoints of older versions.
        hidden: state of the module, as `HiddenTensors` saves it; None: it is not restored.
        trained: which layers were frozen or unfrozen, and what the optimizers train, as `Trained` saves it; None in
            checkpoints of older versions.
        optimizers: state in attributes of optimizers, as `OptimizerState` saves it.
    """

    rng: rng.RngState | None
    positions: list[LoaderState]
    loads: dict[str, Loading]
    unfinished: BatchCount | None
    buffers: dict[str, Tensor]
    epoch: dict[str, Any] | None
    hidden: dict[str, Any] | None
    trained: dict[str, Any] | None
    optimizers: list[list[Any]]

    @classmethod
    def of(cls, plain: dict[str, Any]) -> SavedState | None:
        """Read what the callback has saved; None if it is of another version.

        Raises:
            KeyError, TypeError, ValueError: if it holds values of another kind.
        """
        if plain["rng"] is not None:
            rng.check(plain["rng"])
        try:
            positions = [LoaderState.from_plain(each) for each in plain["loaders"]]
        except (KeyError, TypeError):
            return None
        loads = {name: Loading(**each) for name, each in plain.get("loads", {}).items()}
        for name, each in loads.items():
            if name not in ("train", "val"):
                raise ValueError(f"expected train or val, got {name!r}")
            _check_count(each.epoch)
            rng.check(each.rng)
        unfinished = plain.get("unfinished")
        batches, buffers = None, {}
        if unfinished is not None:
            batches, buffers = BatchCount(**unfinished["batches"]), dict(unfinished["buffers"])
            for count in batches:
                _check_count(count)
            if not all(isinstance(each, Tensor) for each in buffers.values()):
                raise TypeError("expected tensors as buffers")
        epoch = plain.get("epoch")
        if epoch is not None:
            epoch = epoch_state.checked(epoch)
        hidden = dict(plain.get("hidden", {}))
        for each in hidden.values():
            from_plain(each, torch.device("cpu"))
        return cls(
            plain["rng"],
            positions,
            loads,
            batches,
            buffers,
            epoch,
            hidden,
            trained.checked(plain["trained"]) if "trained" in plain else None,
            optimizer_state.checked(plain.get("optimizers", [])),
        )

    def for_another_world(self, has_rng: bool) -> SavedState:
        """As far as it can be used by another number of processes."""
        positions = [of_another_world(position) for position in self.positions]
        epoch = None if self.epoch is None else epoch_state.without_ranks(self.epoch)
        return self._replace(positions=positions, rng=self.rng if has_rng else None, epoch=epoch, hidden=None)


def problem_of(plain: dict[str, Any]) -> str:
    """Why a rank's state cannot be resumed from; empty if it can."""
    unfinished = plain.get("unfinished")
    return "" if unfinished is None else str(unfinished["problem"])


def _check_count(value: Any) -> None:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a count >= 0, got {value!r}")
