"""Changes of the training that are meant: announced in code, or expected at positions that the config names."""

from __future__ import annotations

from collections.abc import Mapping


class Changes:
    """The changes that are not in force yet; a change is in force from the next decision of a step on."""

    def __init__(self) -> None:
        self.announced: tuple[str, ...] = ()
        """Reasons announced on this rank since the last decision, each once, in the order of the calls."""
        self._expected: list[tuple[str, dict[int, str]]] = []
        self.passed: dict[str, int] = {}
        """Reasons and the applied steps when they came last: a step that is dropped is attempted again."""

    def announce(self, reason: str, applied: int) -> None:
        """Announce a change on this rank.

        The same reason counts once at the same position, as with several micro-batches in a window, or if the step is
        dropped.

        Args:
            reason: of the change.
            applied: applied steps so far, as the caller of `stabletrain.announce` reads them; in device mode they
                include a step in flight, even if it will have been dropped.
        """
        if reason not in self.announced and self._comes(reason, applied):
            self.announced += (reason,)

    def take(self) -> tuple[str, ...]:
        """Return the announced reasons, which are in force from now on, and remove them."""
        reasons, self.announced = self.announced, ()
        return reasons

    def _comes(self, reason: str, applied: int) -> bool:
        """Whether a change comes at this position for the first time."""
        if self.passed.get(reason) == applied:
            return False
        recent = {each: at for each, at in self.passed.items() if at >= applied - 1}  # no others can come again
        self.passed = {**recent, reason: applied}
        return True

    def expect(self, plugin: str, positions: Mapping[int, str]) -> None:
        """Expect changes, the same on all ranks.

        Args:
            plugin: name in the event.
            positions: applied steps before the first step of the change, and the reason.
        """
        self._expected.append((plugin, dict(positions)))

    @property
    def expects(self) -> bool:
        """Whether changes are expected at all."""
        return bool(self._expected)

    def expected_at(self, applied: int) -> list[tuple[str, str]]:
        """Names and reasons of the changes expected from the step on that comes after ``applied`` applied steps.

        A position is passed again after a rollback to before it, but not when the step there was dropped.
        """
        due = [(plugin, positions[applied]) for plugin, positions in self._expected if applied in positions]
        return [(plugin, reason) for plugin, reason in due if self._comes(f"{plugin}: {reason}", applied)]
