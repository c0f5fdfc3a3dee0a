"""Every process of a run writes how it ended before it leaves; the launcher reads that and finds the first cause.

The files are in ``ends/`` of the run's folder. If that is full, read-only or removed, they are in a second folder that
the launcher makes in memory for the time of the run and names in the environment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stabletrain.launch.bounded import is_count, one_message, read_json, write_json
from stabletrain.launch.cause import LOST, Lost
from stabletrain.launch.result import Result, parse_result
from stabletrain.runtime.records.run_files import ENDS, RESULT

SPARE_ENV = "STABLETRAIN_ENDS"
"""Environment variable with the path of the second folder."""

_EXITS = "exits.json"
_MAX_RANKS = 100_000
_MAX_PLACE = 500


@dataclass(frozen=True, kw_only=True)
class RankEnd:
    """How one process ended.

    Args:
        rank: of the process.
        result: how it ended.
        consequence: whether another process ended first, and this one for that reason.
        agreed: whether all processes decided this end together, so all were alive.
        lost: how the connection to another process was lost, see `stabletrain.launch.cause.Lost`.
        at: where in the training, such as ``step 12``; empty if it had not begun.
        place: where in the code.
        time_ns: when it ended, in nanoseconds since 1970.
        pid: of the process.
        host: on which it ran.
    """

    rank: int
    result: Result
    consequence: bool = False
    agreed: bool = False
    lost: Lost = ""
    at: str = ""
    place: str = ""
    time_ns: int = field(default_factory=time.time_ns)
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)


def this_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank of this process, from the variables that torchrun, SLURM or Lightning set; 0 without them.

    Args:
        environment: to read.
    """
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return 0


def is_one_of_several(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is one of several of its run.

    Args:
        environment: to read.
    """
    sizes = (environment.get(name, "") for name in ("WORLD_SIZE", "SLURM_NTASKS"))
    return any(size.isdecimal() and int(size) > 1 for size in sizes)


@contextmanager
def spare_folder() -> Iterator[Path | None]:
    """Make the second folder, in memory if the system has such a file system; it is deleted afterwards.

    Yields:
        Its path, for the environment variable `SPARE_ENV` of the workers; None if none can be made.
    """
    folder: Path | None = None
    for parent in ("/dev/shm", None):
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="stabletrain-ends-", dir=parent))
            break
    try:
        yield folder
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def write_end(end: RankEnd, run_dir: Path) -> None:
    """Write the end of this process to the run's folder, or if that fails to the second folder.

    Args:
        end: of this process.
        run_dir: the run's folder; it is not made again if somebody has deleted it.

    Raises:
        OSError: if it can be written to neither.
    """
    failure: OSError | None = None
    for folder in ends_folders(run_dir):
        try:
            folder.mkdir(exist_ok=True)
            write_json(folder / f"rank-{end.rank}.json", asdict(end))
        except OSError as error:
            failure = failure or error
        else:
            return
    if failure is not None:
        raise failure


def read_ends(run_dir: Path, spare: Path | None = None) -> list[RankEnd]:
    """Return the ends that the processes of a run have written, by rank; files with other content are ignored.

    Args:
        run_dir: the run's folder.
        spare: the second folder; None: the one that the environment names, if there is one.
    """
    found: dict[int, RankEnd] = {}
    for folder in ends_folders(run_dir, spare):
        for file in sorted(folder.glob("rank-*.json")):
            with contextlib.suppress(OSError, ValueError):
                end = _parse(read_json(file))
                if end.rank not in found or end.time_ns > found[end.rank].time_ns:
                    found[end.rank] = end
    return [found[rank] for rank in sorted(found)]


def ends_folders(run_dir: Path, spare: Path | None = None) -> list[Path]:
    """Return the folders in which processes write how they ended, the first choice first.

    Args:
        run_dir: the run's folder.
        spare: the second folder; None: the one that the environment names, if there is one.
    """
    second = spare or _spare()
    return [run_dir / ENDS, *([second] if second is not None else [])]


def remove_ends(run_dir: Path) -> None:
    """Remove result and ends of an earlier attempt in the same folder, so that nobody takes them for this one's.

    Args:
        run_dir: the run's folder.
    """
    with contextlib.suppress(OSError):
        (run_dir / RESULT).unlink()
    shutil.rmtree(run_dir / ENDS, ignore_errors=True)


def remove_own_end(run_dir: Path, rank: int) -> None:
    """Remove what this process wrote in an earlier attempt; on rank 0 also result.json.

    Args:
        run_dir: the run's folder.
        rank: of this process.
    """
    for path in (run_dir / ENDS / f"rank-{rank}.json", *([run_dir / RESULT] if rank == 0 else [])):
        with contextlib.suppress(OSError):
            path.unlink()


def write_exit_codes(codes: Mapping[int, int]) -> None:
    """Write the exit codes of processes that failed, as torchrun saw them, to the second folder.

    Args:
        codes: by rank; negative: minus the number of the signal that ended the process.
    """
    spare = _spare()
    if spare is not None:
        with contextlib.suppress(OSError):
            write_json(spare / _EXITS, {str(rank): code for rank, code in codes.items()})


def add_exit_codes(codes: Mapping[int, int], spare: Path | None) -> None:
    """Add the exit codes of processes on other machines to those of this one.

    Args:
        codes: by rank.
        spare: the second folder.
    """
    if codes and spare is not None:
        with contextlib.suppress(OSError):
            together = {**codes, **read_exit_codes(spare)}
            write_json(spare / _EXITS, {str(rank): code for rank, code in together.items()})


def read_exit_codes(spare: Path | None) -> dict[int, int]:
    """Return what `write_exit_codes` wrote; empty if it wrote nothing.

    Args:
        spare: the second folder.
    """
    try:
        content = read_json(spare / _EXITS) if spare is not None else {}
        return {int(rank): int(code) for rank, code in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _spare() -> Path | None:
    name = os.environ.get(SPARE_ENV)
    return Path(name) if name else None


def _parse(content: object) -> RankEnd:
    if not isinstance(content, Mapping):
        raise ValueError("expected an object")
    rank, time_ns, pid = content.get("rank"), content.get("time_ns"), content.get("pid")
    host, consequence, agreed = content.get("host"), content.get("consequence"), content.get("agreed")
    if not (is_count(rank) and is_count(time_ns) and is_count(pid) and isinstance(host, str)):
        raise ValueError("rank, time_ns, pid, host: not those of a process")
    lost, at, place = content.get("lost", ""), content.get("at", ""), content.get("place", "")
    if lost not in LOST or not isinstance(at, str) or not isinstance(place, str):
        raise ValueError("lost, at, place: not those of a process")
    if not isinstance(consequence, bool) or not isinstance(agreed, bool) or rank >= _MAX_RANKS:
        raise ValueError("consequence, agreed, rank: not those of a process")
    return RankEnd(
        rank=rank,
        result=parse_result(content.get("result")),
        consequence=consequence,
        agreed=agreed,
        lost=lost,
        at=one_message(at, _MAX_PLACE),
        place=one_message(place, _MAX_PLACE),
        time_ns=time_ns,
        pid=pid,
        host=one_message(host, 255),
    )
