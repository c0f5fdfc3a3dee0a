"""What rank 0 writes after the first batch of an attempt, and what is known of the steps before it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from stabletrain.launch.bounded import is_count, read_json, write_json
from stabletrain.launch.rank_ends import ends_folders
from stabletrain.runtime.records.run_files import STEPS
from stabletrain.runtime.records.steps_file import RECORD_BYTES

_FILE = "began.json"


@dataclass(frozen=True, kw_only=True)
class Began:
    """What an attempt wrote after its first batch.

    Args:
        attempt: its number.
        from_step: attempted steps in the checkpoint that it went on from; 0 for new weights.
        steps_lost: steps that it makes again.
        time_ns: when its first batch was done, in nanoseconds since 1970.
    """

    attempt: int
    from_step: int
    steps_lost: int
    time_ns: int


def write_began(began: Began, run_dir: Path) -> None:
    """Write it where the ends of the processes are; if that is impossible, the launcher does not learn it.

    Args:
        began: of this attempt.
        run_dir: the run's folder.
    """
    for folder in ends_folders(run_dir):
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            write_json(folder / _FILE, asdict(began))
            return


def read_began(run_dir: Path, attempt: int, spare: Path | None = None) -> Began | None:
    """Return what an attempt wrote after its first batch; None if it had none.

    Args:
        run_dir: the run's folder.
        attempt: its number.
        spare: as for `stabletrain.launch.rank_ends.read_ends`.
    """
    names = ("attempt", "from_step", "steps_lost", "time_ns")
    for folder in ends_folders(run_dir, spare):
        with suppress(OSError, ValueError):
            content = read_json(folder / _FILE)
            if isinstance(content, Mapping) and all(is_count(content.get(name)) for name in names):
                began = Began(**{name: content[name] for name in names})
                if began.attempt == attempt:
                    return began
    return None


def recorded_steps(folder: Path) -> int:
    """Return how many steps a run has attempted, as its record says.

    Args:
        folder: the run's folder.
    """
    try:
        return (folder / STEPS).stat().st_size // RECORD_BYTES
    except OSError:
        return 0


def last_step_at(folder: Path) -> int:
    """Return when the last step was recorded, in nanoseconds since 1970; 0 if none was.

    Args:
        folder: the run's folder.
    """
    try:
        return (folder / STEPS).stat().st_mtime_ns
    except OSError:
        return 0
