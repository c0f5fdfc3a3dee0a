"""When the dataloaders were loaded, and loading them in the same way in a resumed run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lightning.pytorch import Trainer

from stabletrain.runtime import rng
from stabletrain.runtime.internals import resuming


class Loading(NamedTuple):
    """One call of the module's or data module's dataloader method.

    Args:
        epoch: ``trainer.current_epoch`` then.
        rng: the global generators before it.
    """

    epoch: int
    rng: rng.RngState


class Loads:
    """The train and validation dataloaders are loaded as at the checkpoint: at that epoch, with those random numbers.

    Lightning does not save the epoch of the last reload: with ``reload_dataloaders_every_n_epochs`` of 2 and more, a
    resumed run reloads in other epochs, and a dataloader method that looks at ``trainer.current_epoch`` or draws random
    numbers returns other data.

    Args:
        trainer: before its fit loop has loaded them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._done: dict[str, Loading] = {}
        self._planned: dict[str, Loading] = {}
        self._undo: Callable[[], None] = resuming.around_loading(trainer, self._load)

    def close(self) -> None:
        """Stop observing."""
        self._undo()

    @property
    def done(self) -> dict[str, Loading]:
        """The last ones, by ``"train"`` and ``"val"``; those that `repeat` plans included."""
        return {**self._done, **self._planned}

    def repeat(self, loads: dict[str, Loading]) -> None:
        """Load as in these the next time, once. Train loaders that are loaded already are loaded again."""
        self._planned, self._done = dict(loads), {}
        resuming.load_train_again(self._trainer)

    def _load(self, name: str, is_reload: bool, setup_data: Callable[[], bool]) -> None:
        planned = self._planned.get(name)
        if planned is None or is_reload or self._trainer.sanity_checking:
            now = Loading(self._trainer.current_epoch, rng.capture())
            loaded = setup_data()
        else:
            now = planned
            with rng.preserved(), resuming.at_epoch(self._trainer, planned.epoch):
                rng.restore(planned.rng)
                loaded = setup_data()
        if loaded:
            self._planned.pop(name, None)
            self._done[name] = now
