"""The segments of a recorded run: what ran between two starts, each from the checkpoint of the one before."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.launch.bounded import read_json
from stabletrain.launch.earlier_steps import read_resumes
from stabletrain.launch.recorded_run import RecordedRun, belongs_to, run_of_folder
from stabletrain.runtime.records.run_files import CHECKPOINTS, RESUMED, STEPS
from stabletrain.runtime.records.steps_file import Steps, read_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_SEGMENTS = 1_000


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One start of a run, and what it has recorded.

    Args:
        run: to which it belongs.
        name: the folder of its artifacts, from `RecordedRun.segments`.
        config: the content of its run.yaml, unchecked.
    """

    run: RecordedRun
    name: str
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path | None:
        """Its folder, if it is on this machine."""
        if self.run.run_id is None:
            return self.run.folder
        named = self.config.get("run_dir")
        if isinstance(named, str) and "\0" not in named and belongs_to(Path(named), self.run.run_id):
            return Path(named)
        return self.run.folder if len(self.run.segments()) == 1 else None

    @property
    def resumed_from(self) -> Path | None:
        """The checkpoint from which it was resumed; None if it began with new weights."""
        resume = self.config.get("resume")
        return Path(resume) if isinstance(resume, str) and "\0" not in resume else None

    def file(self, name: str) -> Path | None:
        """Return a file that it has recorded; None if there is none.

        Args:
            name: such as ``environment/code.json``.
        """
        folder = self.folder
        if folder is not None and (folder / name).is_file():
            return folder / name
        return self.run.file(name, self.name)

    def json(self, name: str) -> Mapping[str, Any] | None:
        """Return the content of a JSON file that it has recorded; None if there is no such file, or no object in it.

        Args:
            name: as for `file`.
        """
        path = self.file(name)
        with suppress(OSError, ValueError):
            content = None if path is None else read_json(path)
            return content if isinstance(content, Mapping) else None
        return None

    def steps(self) -> Steps | None:
        """Return the record of the steps until its end, with those before it was resumed; None if there is none."""
        path = self.file(STEPS)
        if path is None and self.name == self.run.segments()[-1]:
            path = self.run.file(STEPS, "")
        with suppress(OSError):
            found = None if path is None else read_steps(path)
            return found if found is not None and len(found.step) else None
        return None

    def resumes(self) -> list[int]:
        """Return the attempted steps at which the run was resumed until this segment, as far as they are recorded."""
        path = self.file(RESUMED)
        if path is None and self.name == self.run.segments()[-1]:
            path = self.run.file(RESUMED, "")
        return [] if path is None else read_resumes(path)


def segments_of(run: RecordedRun, *, command: str) -> list[Segment]:
    """Return the segments that led to the end of a run, the first start first; empty if it has no run.yaml.

    Args:
        run: the run; the runs from whose checkpoints it was resumed are found by their folders.
        command: begins the messages.

    Raises:
        UserError: if a run.yaml or the store cannot be read.
    """
    own = _own_segments(run)
    if not own:
        return []
    chain = [own[-1]]
    while (checkpoint := chain[0].resumed_from) is not None and len(chain) < MOST_SEGMENTS:
        folder = _run_folder(checkpoint)
        earlier = folder and (_with_folder(own, folder) or _of_another_run(folder, chain[0].run, command))
        if not earlier or any(each.run.name == earlier.run.name and each.config == earlier.config for each in chain):
            break
        chain.insert(0, earlier)
    return chain


def _own_segments(run: RecordedRun) -> list[Segment]:
    names = run.segments()
    configs = [(name, run.config(name) if run.run_id is not None else run.config()) for name in names]
    if configs[0][1] is None and len(configs) == 1:  # its artifacts were not uploaded
        configs = [("", run.config())]
    return [Segment(run=run, name=name, config=config) for name, config in configs if config]


def _run_folder(checkpoint: Path) -> Path | None:
    """The folder of the run to which a checkpoint belongs."""
    for each in (checkpoint, *checkpoint.parents):
        if each.name == CHECKPOINTS:
            return each.parent
    return None


def _with_folder(segments: Sequence[Segment], folder: Path) -> Segment | None:
    path = os.path.realpath(folder)
    named = ((each, each.config.get("run_dir")) for each in segments)
    return next((each for each, own in named if isinstance(own, str) and os.path.realpath(own) == path), None)


def _of_another_run(folder: Path, run: RecordedRun, command: str) -> Segment | None:
    found = run_of_folder(folder, command=command, uri=run.uri)
    if found is None:
        return None
    segments = _own_segments(found)
    return _with_folder(segments, folder) or (segments[0] if len(segments) == 1 else None)
