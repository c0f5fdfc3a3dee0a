"""What `stabletrain replay` reads, and the replay of the whole default stack."""

import math
import random
from pathlib import Path

import pytest
from joint_replay import default_rules
from joint_replay import replay_together as joined

from stabletrain.cli.recorded import read
from stabletrain.cli.replay import replay_stack
from stabletrain.core.joint_replay import Snapshots, replay_together
from stabletrain.errors import UserError

SNAPSHOTS = Snapshots(every=25, keep=3, trust_after=25, max_rollbacks=2, cool_down=100, accept=None)


def same(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> bool:
    return repr(found) == repr(expected)  # NaN included


@pytest.mark.parametrize("prefix", ["", "stability/"])
def test_a_file_of_csv_logger(prefix: str, tmp_path: Path) -> None:
    """Bugs: an empty cell is a broken number; loss and norm in two rows of one step are lost; the user's own loss."""
    file = tmp_path / "metrics.csv"
    head = f"epoch,{prefix}grad_norm,{prefix}loss,step,val" + (",loss" if prefix else "")
    rows = ["0,,,0,0.3", "0,0.5,,0,", "0,,2.0,0,", "0,inf,nan,1,", "0,,1.0,2,", "0,,,2,0.3", "1,0.25,1.5,0,"]
    file.write_text("\n".join([head, *(row + (",9" if prefix else "") for row in rows)]) + "\n")
    series = read(str(file))
    assert same(series.pairs, [(2.0, 0.5), (math.nan, math.inf), (1.5, 0.25)])
    assert "1 steps have only one of loss and grad_norm" in series.note


def test_a_file_without_steps_or_with_steps_of_an_epoch(tmp_path: Path) -> None:
    """Bug: rows of two epochs with the same step are taken for one."""
    file = tmp_path / "metrics.csv"
    file.write_text("step,loss,grad_norm\n0,1,2\n1,3,4\n0,5,6\n1,7,8\n")
    assert read(str(file)).pairs == [(1, 2), (3, 4), (5, 6), (7, 8)]
    file.write_text("loss,grad_norm\n1,2\n,\n3,4\n")
    assert read(str(file)).pairs == [(1, 2), (3, 4)]


def test_mlflows_long_export(tmp_path: Path) -> None:
    """Bugs: only a wide file is read; order of the rows; two runs taken for one; a mean taken for a step."""
    file = tmp_path / "export.csv"
    rows = ["a,loss,50,1.5,2", "a,loss,0,2.0,1", "a,grad_norm,0,0.5,1", "a,grad_norm,50,Infinity,2", "a,loss,100,NaN,3"]
    rows += ["a,grad_norm,100,1,3", "a,val_loss,100,,3"]
    file.write_text("\n".join(["run_id,key,step,value,timestamp", *rows[:-1]]))
    series = read(str(file))
    assert same(series.pairs, [(2.0, 0.5), (1.5, math.inf), (math.nan, 1.0)])
    assert "one value for every 50 steps" in series.note
    file.write_text(
        "\n".join(["Run,metric,step,value", *(row.rpartition(",")[0] for row in rows), "b,stability/loss,0,1"])
    )
    with pytest.raises(UserError, match=r"export\.csv has 2 runs; choose one with --run: a, b"):
        read(str(file))
    assert len(read(str(file), "a").pairs) == 3
    with pytest.raises(UserError, match="lacks the metric grad_norm"):
        read(str(file), "b")
    with pytest.raises(UserError, match="has no run 'c'"):
        read(str(file), "c")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("key,step,value\nloss,x,1\n", ["line 2", "expected a whole number as step, got 'x'"]),
        ("key,step,value\nloss,0,\n", ["line 2", "value=''"]),
        ("key,step,value\n", ["lacks the metric loss"]),
        ("step,loss,grad_norm\n0,1,\n", ["no rows that have both"]),
        ("loss,grad_norm\n1,\n", ["line 2"]),
        ("step,loss,grad_norm\n0,1,-2\n", ["line 2", "grad_norm >= 0"]),
    ],
)
def test_a_broken_file_is_one_message(text: str, words: list[str], tmp_path: Path) -> None:
    """Bug: a traceback, or a message without the line."""
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read(str(file))
    for word in ("bad.csv", *words):
        assert word in str(error.value)


def noisy(seed: int, steps: int, at: int, factor: float) -> list[tuple[float, float]]:
    r = random.Random(seed)
    return [((2 + r.gauss(0, 0.05)) * (factor if t >= at else 1), math.exp(r.gauss(0, 0.2))) for t in range(steps)]


def test_rules_are_joined_as_the_guard_joins_them() -> None:
    """Bug: each rule is replayed alone, so that a skipped step enters the history of the others."""
    series = noisy(0, 300, 300, 1.0)
    series[170] = (math.nan, 1.0)
    series[200:206] = [(50.0, 400.0)] * 6
    steps = list(replay_together(default_rules(), series, SNAPSHOTS))
    expected = list(joined(default_rules(), series))
    assert [repr(step.outcome) for step in steps] == [repr(step.outcome) for step in expected]
    assert [step.events for step in steps] == [step.events for step in expected]
    assert any(step.outcome.skipped for step in steps)


def test_rollbacks_of_a_stack() -> None:
    """Bugs: a request at each step of a level that lasts; no end after the last rollback; a level never accepted."""
    series = noisy(1, 500, 300, 3.0)
    steps = list(replay_together(default_rules(), series, SNAPSHOTS))
    back = [(step.outcome.step, step.back_to) for step in steps if step.back_to is not None]
    assert len(back) == 2
    assert all(target <= 300 < at for at, target in back)
    assert "2 rollbacks did not help" in steps[-1].ends
    assert len(steps) < len(series)
    accepting = list(replay_together(default_rules(), series, SNAPSHOTS._replace(accept=40)))
    assert [step.accepted for step in accepting].count(True) == 1
    assert len(accepting) == len(series)
    (last,) = (step for step in replay_together(default_rules(), series) if step.ends)
    assert "no plugin rolls back" in last.ends


def test_the_command_with_the_whole_stack(tmp_path: Path) -> None:
    """Bugs: requests are named by number; a choice for a slot is ignored, or misspelt without a word."""
    file = tmp_path / "series.csv"
    file.write_text("loss,grad_norm\n" + "".join(f"{loss},{norm}\n" for loss, norm in noisy(1, 400, 300, 3.0)))
    text = replay_stack(str(file))
    assert "clip_zscore, skip_nonfinite, skip_outliers, rollback: 400 steps" in text
    assert "requests rollback: " in text
    assert "1 x accept" in text
    assert "1 x request rollback" in text or "2 x request rollback" in text
    chosen = replay_stack(str(file), ["clip=norm", "plugins/spike=detect"])
    assert "clip_norm, skip_nonfinite, skip_outliers, detect_spikes: " in chosen
    assert "the run would stop here: no plugin rolls back" in chosen
    with pytest.raises(UserError, match="clip has no option 'nrom'"):
        replay_stack(str(file), ["clip=nrom"])
    with pytest.raises(UserError, match="expected SLOT=OPTION"):
        replay_stack(str(file), ["clip"])
