"""Values of which each optimizer of a module has its own, for modules with several (manual optimization).

The history of a discriminator's losses says nothing about the generator's. So everything that is learned from steps,
and everything that is known about the step in progress, exists once for each optimizer. The code that handles a step is
the same for one optimizer and for several: before a step, the values of its optimizer are selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class PerOptimizer:
    """Some attributes of an object, once for each optimizer.

    The attributes of the object itself are those of the selected optimizer; this class keeps those of the others.

    Args:
        owner: the object.
        names: of the attributes.
        start: sets these attributes to what they are before the first step.

    >>> class Counter:
    ...     def start(self): self.count = 0
    >>> counter = Counter()
    >>> counter.start()
    >>> each = PerOptimizer(counter, ("count",), counter.start)
    >>> counter.count = 3
    >>> each.select(1)
    >>> counter.count
    0
    >>> [counter.count for _ in each]
    [3, 0]
    """

    def __init__(self, owner: object, names: tuple[str, ...], start: Callable[[], None]) -> None:
        self._owner, self._names, self._start = owner, names, start
        self._kept: dict[int, dict[str, Any]] = {}
        self.selected = 0
        """Index of the optimizer whose values are the object's attributes."""

    def __len__(self) -> int:
        return len(self._kept) + 1

    def __iter__(self) -> Iterator[int]:
        """Select one optimizer after another, and in the end the one that was selected before."""
        before = self.selected
        try:
            for index in range(len(self)):
                self.select(index)
                yield index
        finally:
            self.select(before)

    def select(self, index: int) -> None:
        """Exchange the values for those of another optimizer; a new one has those from before the first step."""
        if index == self.selected:
            return
        values = vars(self._owner)
        self._kept[self.selected] = {name: values[name] for name in self._names if name in values}
        self.selected = index
        if index in self._kept:
            values.update(self._kept.pop(index))
        else:
            self._start()

    def grow(self, number: int) -> None:
        """Have values for at least so many optimizers."""
        before = self.selected
        for index in range(len(self), number):
            self.select(index)
        self.select(before)

    def restart(self, number: int) -> None:
        """Have values for so many optimizers, and select the first one."""
        self.select(0)
        self._kept = {index: values for index, values in self._kept.items() if index < number}
        self.grow(number)
