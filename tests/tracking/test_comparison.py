import math

import pytest

from stabletrain.errors import UserError
from stabletrain.tracking import RunSummary, compare, side_by_side
from stabletrain.tracking.runs import create_run, write_params

A = RunSummary(
    run_id="1", name="a", status="FINISHED", params={"lr": "0.1", "seed": "0"}, metrics={"val/loss": 2.0, "lr": 0.1}
)
B = RunSummary(run_id="2", name="b", status="FAILED", params={"lr": "0.2", "seed": "0", "x": "1"})


def test_only_differences():
    """Bug: the one setting that differs drowns in a hundred that do not; a missing one counts as equal."""
    result = side_by_side([A, B])
    assert dict(result.params) == {"lr": ("0.1", "0.2"), "x": (None, "1")}
    assert dict(result.metrics) == {"lr": (0.1, None), "val/loss": (2.0, None)}


def test_selection_by_pattern():
    """Bug: naming a parameter hides it because it is equal."""
    result = side_by_side([A, B], metrics=["val/*"], params=["seed"])
    assert dict(result.params) == {"seed": ("0", "0")}
    assert list(result.metrics) == ["val/loss"]


def test_nan_is_not_missing():
    """Bug: a run that diverged looks like one that did not log."""
    bad = RunSummary(run_id="3", name="c", status="FAILED", metrics={"val/loss": math.nan})
    assert side_by_side([A, B, bad], metrics=["val/loss"]).table()[-1] == ["val/loss", "2", "-", "nan"]
    assert len(side_by_side([A, B, bad]).to_pandas()) == 3
    assert side_by_side([]).table() == [[""], ["status"]]


def test_from_the_store(uri, client):
    """Bug: columns are not in the order asked for, or the last metric is not the final one."""
    ids = [create_run(uri, "demo", name=name) for name in ("one", "two")]
    for run_id, rate in zip(ids, (0.1, 0.2), strict=True):
        write_params(client, run_id, {"optimizer": {"lr": rate}, "seed": 0})
        for step in range(3):
            client.log_metric(run_id, "loss", rate * step, step=step)
    result = compare(uri, ids[::-1])
    assert [run.name for run in result.runs] == ["two", "one"]
    assert dict(result.params) == {"optimizer.lr": ("0.2", "0.1")}
    assert result.metrics["loss"] == (0.4, 0.2)
    assert {run.run_id for run in compare(uri, experiment="demo").runs} == set(ids)


def test_what_does_not_exist(uri):
    """Bug: a mistyped name gives an empty table or a traceback."""
    with pytest.raises(UserError, match=r"no run 'feed'"):
        compare(uri, ["feed"])
    with pytest.raises(UserError, match=r"no experiment 'demoo'.*Default"):
        compare(uri, experiment="demoo")
    with pytest.raises(UserError, match="either run_ids or experiment"):
        compare(uri)
