"""The file ``lr_range.csv`` of a learning-rate range test: a row for every attempted step, readable while it grows."""

from __future__ import annotations

import csv
from pathlib import Path

from stabletrain.core.lr_range import RangePoint
from stabletrain.core.outcome import Outcome

COLUMNS = ("step", "lr", "loss", "grad_norm", "clipped", "applied")


class LRRangeFile:
    """Writes the file, a line at a time.

    Args:
        path: of the file; one that is there is replaced.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", newline="", buffering=1)
        self._writer = csv.writer(self._file)
        self._writer.writerow(COLUMNS)

    def append(self, rate: float, outcome: Outcome) -> None:
        """Add an attempted step.

        Args:
            rate: its learning rate.
            outcome: of the step.
        """
        flags = int(outcome.clipped), int(outcome.applied)
        self._writer.writerow([outcome.step, rate, outcome.loss, outcome.grad_norm, *flags])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lr_range(path: Path) -> list[RangePoint]:
    """Return the steps in a file; empty if there is no file. A row that is not complete is left out.

    Args:
        path: of the file.
    """
    found = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                try:
                    float(row["applied"])  # the last column: the row is complete
                    found.append(RangePoint(float(row["lr"]), float(row["loss"])))
                except (TypeError, ValueError, KeyError):
                    continue
    except (OSError, UnicodeDecodeError):
        return []
    return found
