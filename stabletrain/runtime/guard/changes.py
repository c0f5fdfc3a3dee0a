"""Changes of the training that are meant: announced in code, or expected at positions that the config names."""

from __future__ import annotations

from collections.abc import Mapping


class Changes:
    """The changes that are not in force yet; a change is in force from the next decision of a step on."""

    def __init__(self) -> None:
        self.announced: tuple[str, ...] = ()
        """Reasons announced on this rank since the last decision, each once, in the order of the calls."""
        self._expected: list[tuple[str, dict[int, str]]] = []

    def announce(self, reason: str) -> None:
        """Announce a change on this rank; the same reason counts once, as with several micro-batches in a window."""
        if reason not in self.announced:
            self.announced += (reason,)

    def take(self) -> tuple[str, ...]:
        """Return the announced reasons and remove them."""
        reasons, self.announced = self.announced, ()
        return reasons

    def expect(self, plugin: str, positions: Mapping[int, str]) -> None:
        """Expect changes, the same on all ranks.

        Args:
            plugin: name in the event.
            positions: applied steps before the first step of the change, and the reason.
        """
        self._expected.append((plugin, dict(positions)))

    def expected_at(self, applied: int) -> list[tuple[str, str]]:
        """Names and reasons of the changes expected from the step on that comes after ``applied`` applied steps.

        It depends on the number of applied steps alone: a position is passed again after a rollback to before it and
        when a step there was not applied, and needs no state in a checkpoint.
        """
        return [(plugin, positions[applied]) for plugin, positions in self._expected if applied in positions]
