"""Which batches of the train loader are excluded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from lightning.pytorch import Trainer

from stabletrain.errors import UserError
from stabletrain.runtime.data.tape import Identity, TapedBatch
from stabletrain.runtime.internals import loader as loader_internals


class Exclusions:
    """The batches that the loop does not get: by identity whenever they come, or by their number on the tape.

    Args:
        trainer: whose train loader it is.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._identities: set[Identity] = set()
        self._events: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._identities or self._events)

    @property
    def identities(self) -> frozenset[Identity]:
        """The excluded identities."""
        return frozenset(self._identities)

    def add(self, identities: Iterable[Sequence[Any]]) -> None:
        """Exclude batches by `TapedBatch.identity` or `TapedBatch.position_key`."""
        self._identities |= {tuple(each) for each in identities}

    def remove(self, identities: Iterable[Sequence[Any]]) -> None:
        """Do not exclude these batches any more when they come again."""
        self._identities -= {tuple(each) for each in identities}

    def add_events(self, numbers: AbstractSet[int]) -> None:
        """Exclude batches by their numbers on the tape."""
        self._events |= numbers

    def forget_events_before(self, number: int) -> None:
        """Drop the numbers of events that will not be replayed again."""
        self._events = {event for event in self._events if event >= number}

    def cover(self, number: int, batch: TapedBatch) -> bool:
        """Whether this batch, with this number on the tape, is excluded."""
        return bool(self) and (
            number in self._events or batch.identity in self._identities or batch.position_key in self._identities
        )

    def cover_identity(self, name: Identity) -> bool:
        """Whether a batch of this identity is excluded."""
        return name in self._identities

    def require_one_loader(self) -> None:
        """Refuse several train loaders.

        Raises:
            UserError: if the trainer has several train loaders.
        """
        count = len(loader_internals.train_loaders(self._trainer))
        if count > 1:
            raise UserError(
                f"excluding batches requires a single train loader, got {count}: a batch is then a combination of one "
                "batch from each. Use one train loader, or roll back without excluding batches."
            )
