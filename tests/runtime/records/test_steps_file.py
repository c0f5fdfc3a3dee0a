"""The record of every step."""

import math
import os
import struct
from pathlib import Path

import pytest

from stabletrain.core.outcome import Outcome
from stabletrain.runtime.records.steps_file import Flag, StepsFile, flags_of, read_steps


def test_what_a_resumed_run_makes_again_is_overwritten(tmp_path: Path) -> None:
    """Bugs: a record at another place than its step's; the killed process's last steps stay behind a resumed run's;
    bits of the loss are lost; a NaN or an infinite value is written as another one."""
    path = tmp_path / "steps.bin"
    losses = [0.1 + 0.2, math.inf, -math.inf, -0.0, math.nan, 5e-324, 1e308, 7.0]
    first = StepsFile(path)
    for step, loss in enumerate(losses):
        first.append(step, loss, loss * 2, Flag.RECORDED)
    first.flush()  # and then the process is killed
    assert path.stat().st_size == 17 * len(losses)
    resumed = StepsFile(path)
    resumed.cut(5)
    for step in (5, 6):
        resumed.append(step, 3.0, 4.0, Flag.RECORDED | Flag.SKIPPED)
    resumed.close()
    resumed.close()
    first.close()
    read = read_steps(path)
    assert read.step.tolist() == list(range(7))
    assert struct.pack("<5d", *read.loss[:5]) == struct.pack("<5d", *losses[:5])
    assert read.loss[5:].tolist() == [3.0, 3.0]
    assert read.grad_norm[5:].tolist() == [4.0, 4.0]
    assert read.flags.tolist() == [1] * 5 + [3, 3]


def test_holes_and_half_a_record_are_no_steps(tmp_path: Path) -> None:
    """Bugs: a killed process's half record is read as a step; steps that nobody recorded are read as loss 0."""
    path = tmp_path / "steps.bin"
    file = StepsFile(path)
    file.append(2, 1.5, 2.5, Flag.RECORDED)
    file.append(5, 1.0, 2.0, Flag.RECORDED)
    file.close()
    for cut in range(1, 17):
        os.truncate(path, 17 * 6 - cut)
        assert read_steps(path).step.tolist() == [2], cut
    path.write_bytes(b"")
    assert read_steps(path).step.tolist() == []
    with pytest.raises(OSError, match="no regular file"):
        read_steps(tmp_path)


def test_flags_of() -> None:
    """Bug: a step that was dropped counts as clipped, or one that was clipped does not."""
    plain = Outcome(0, 1.0, 2.0, 2.0, 2.0)
    assert flags_of(plain) == 1
    assert flags_of(plain._replace(applied_norm=1.0)) == 9
    assert flags_of(plain._replace(skipped=True, applied_norm=math.nan, no_loss=True)) == 19
    assert flags_of(plain._replace(overflow=True, applied_norm=math.nan, grad_norm=math.inf)) == 5
