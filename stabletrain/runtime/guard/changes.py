"""Changes of the training that are meant: announced in code, or expected at positions that the config names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class Changes:
    """The changes that are not in force yet; a change is in force from the next decision of a step on."""

    def __init__(self) -> None:
        self.announced: tuple[str, ...] = ()
        """Reasons announced on this rank since the last decision, each once, in the order of the calls."""
        self._expected: list[tuple[str, dict[int, str]]] = []
        # a step that is dropped is attempted again: the change at its position is in force already
        self._in_force: tuple[int, frozenset[str]] = (-1, frozenset())

    def announce(self, reason: str, applied: int) -> None:
        """Announce a change on this rank.

        The same reason counts once at the same position, as with several micro-batches in a window, or if the step is
        dropped.

        Args:
            reason: of the change.
            applied: applied steps so far.
        """
        if reason not in self.announced and not self._is_in_force(reason, applied):
            self.announced += (reason,)

    def take(self, applied: int) -> tuple[str, ...]:
        """Return the announced reasons, which are in force from now on, and remove them.

        Args:
            applied: applied steps so far.
        """
        reasons, self.announced = self.announced, ()
        self._enforce(reasons, applied)
        return reasons

    def after_restore(self) -> None:
        """After the state of an earlier step was restored: positions are passed again."""
        self._in_force = (-1, frozenset())

    def _is_in_force(self, reason: str, applied: int) -> bool:
        return self._in_force[0] == applied and reason in self._in_force[1]

    def _enforce(self, reasons: Iterable[str], applied: int) -> None:
        known = self._in_force[1] if self._in_force[0] == applied else frozenset()
        self._in_force = (applied, known | frozenset(reasons))

    def expect(self, plugin: str, positions: Mapping[int, str]) -> None:
        """Expect changes, the same on all ranks.

        Args:
            plugin: name in the event.
            positions: applied steps before the first step of the change, and the reason.
        """
        self._expected.append((plugin, dict(positions)))

    def expected_at(self, applied: int) -> list[tuple[str, str]]:
        """Names and reasons of the changes expected from the step on that comes after ``applied`` applied steps.

        A position is passed again after a rollback to before it, but not when the step there was dropped.
        """
        due = [(plugin, positions[applied]) for plugin, positions in self._expected if applied in positions]
        due = [(plugin, reason) for plugin, reason in due if not self._is_in_force(f"{plugin}: {reason}", applied)]
        if due:
            self._enforce((f"{plugin}: {reason}" for plugin, reason in due), applied)
        return due
