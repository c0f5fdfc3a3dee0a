"""The judge and the faults of benchmarks/faults.py: what its tables say must be what happened."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(autouse=True)
def _suite_is_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else the benchmark sets it for the tests after these
    yield
    for name in [name for name in sys.modules if name == "faults" or name.split(".")[0] == "fault_suite"]:
        del sys.modules[name]


def record(scenario: Any, losses: list[float | None], contender: str = "default stack", **more: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"ended": "", "wasted": 0, "skips": [], "rollbacks": [], "seed": 0}
    names = {"contender": contender, "condition": scenario.condition.name, "scenario": scenario.name}
    return {**plain, **names, "losses": losses, **more}


def test_every_row_has_its_own_name_and_every_condition_its_own_setup() -> None:
    """Bugs: two rows that share a key of the record; records of another rate, precision or window that are taken for
    those of this condition; a condition that is never trained."""
    from fault_suite import harness
    from fault_suite.other_faults import OTHER_CONDITIONS, OTHER_FAULTS
    from fault_suite.scenarios import CONDITIONS, SCENARIOS

    rows, conditions = (*SCENARIOS, *OTHER_FAULTS), (*CONDITIONS, *OTHER_CONDITIONS)
    assert len({row.name for row in rows}) == len(rows)
    assert len({each.name for each in conditions}) == len(conditions)
    assert len({harness.setup(each) for each in conditions}) == len(conditions)
    assert {row.condition for row in rows} == set(conditions)
    assert all(row.condition.fault + row.window <= row.condition.steps for row in rows if row.make_fault is not None)


def test_the_aims_name_rows_that_exist() -> None:
    """Bug: an aim that is never judged since its row was renamed."""
    from fault_suite import reaches
    from fault_suite.other_faults import OTHER_FAULTS
    from fault_suite.scenarios import SCENARIOS

    assert set(reaches.BEFORE) == {row.name for row in SCENARIOS}
    assert {*reaches.LIMITS, *reaches.NO_WORSE} <= {row.name for row in (*SCENARIOS, *OTHER_FAULTS)}


@pytest.mark.parametrize(("micro_batches", "wanted"), [(1, None), (4, 1)])
def test_a_fault_of_chosen_steps_acts_in_these_only(micro_batches: int, wanted: int | None) -> None:
    """Bugs: a burst that is not interleaved; steps counted from the run's start; all micro-batches affected."""
    from fault_suite.injected import every, only

    from stabletrain import chaos

    fault = only(
        chaos.ScaledLoss(10, 2.0, steps=6),
        lambda step, micro: every(2)(step, micro) and wanted in (None, micro),
    )
    acted = []
    for batch in range(20 * micro_batches):
        trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(batch_idx=batch), accumulate_grad_batches=micro_batches)
        if fault.is_due(trainer, batch // micro_batches):
            acted.append((batch // micro_batches, batch % micro_batches))
    assert acted == [(step, wanted or 0) for step in (10, 12, 14)]


def test_a_share_of_the_steps_is_the_same_in_every_run() -> None:
    """Bug: a share drawn anew by each contender, so that they meet different faults."""
    from fault_suite.injected import share

    first, again, other = ([share(0.3, seed)(step, 0) for step in range(400)] for seed in (0, 0, 1))
    assert first == again != other
    assert 0.2 < sum(first) / 400 < 0.4


def test_a_bad_shard_is_known_by_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs, all after a rollback: batches from before the shard become bad; the shard begins again or grows; its
    batches are healthy when they are repeated."""
    from fault_suite.injected import BadShard, digest

    from stabletrain import chaos

    monkeypatch.setattr(chaos.Fault, "on_train_batch_start", lambda *_: None)
    batches = [torch.full((2, 3), i) for i in range(10)]
    shard = BadShard(4, "random", 3, vocabulary=5)
    shard.healthy = {digest(batch) for batch in batches[:4]}

    def bad(order: list[int]) -> list[int]:
        found = []
        for i in order:
            shard.on_train_batch_start(None, None, batches[i], i)  # type: ignore[arg-type]
            found += [i] if shard.is_due(None, i) else []  # type: ignore[arg-type]
        return found

    assert bad([4, 5]) == [4, 5]
    assert bad([2, 3, 5, 6, 7]) == [5, 6]  # back to 2; 4 is left out
    assert bad([3, 4, 8, 9]) == [4]


def test_the_healthy_loss_is_the_mean_of_the_last_measurements() -> None:
    """Bugs: the loss of the whole run, which hides where it ends; a run that did not survive with a good loss."""
    from fault_suite.judge import LAST, Results
    from fault_suite.scenarios import FAULT_FREE, HEALTHY

    losses: list[float | None] = [9.0] * 5 + [2.0, 3.0] * (LAST // 2)
    made = {**record(HEALTHY, losses), "scenario": FAULT_FREE}
    cell = Results.of([made], [0]).cell("default stack", HEALTHY)
    assert cell is not None
    assert cell.loss == 2.5
    lost = Results.of([{**made, "ended": "not finite at 9"}], [0]).cell("default stack", HEALTHY)
    assert lost is not None
    assert lost.loss != lost.loss


def _aim(what: str, records: list[dict[str, Any]], healthy: list[dict[str, Any]]) -> Any:
    from fault_suite.judge import Results
    from fault_suite.reaches import reaches

    return next(each for each in reaches(Results.of(records, [0]), healthy) if each.what == what)


@pytest.mark.parametrize(("above", "holds"), [(0.02, True), (0.05, False)])
def test_the_healthy_loss_is_compared_with_the_best_contender(above: float, holds: bool) -> None:
    """Bugs: compared with the run without protection, which is not the best; not measured taken for reached."""
    from fault_suite.scenarios import FAULT_FREE, HEALTHY

    what = "held-out loss without a fault"
    mine = {**record(HEALTHY, [2.4 + above] * 12), "scenario": FAULT_FREE}
    others = [
        {**record(HEALTHY, [loss] * 12, contender=name), "scenario": FAULT_FREE}
        for name, loss in (("nothing", 2.6), ("clip 1.0", 2.4))
    ]
    assert _aim(what, [mine, *others], []).holds is holds
    assert _aim(what, [mine], []).holds is None
    assert _aim(what, others, []).holds is None


def test_fp16_must_complete_and_end_near_fp32() -> None:
    """Bugs: a run that was stopped counts; the two precisions are exchanged."""
    from fault_suite.other_faults import NAN_REPEATED, NAN_REPEATED_HALF
    from fault_suite.scenarios import FAULT_FREE

    what = "fp16, NaN gradient in every 5th batch: held-out loss"
    twins = [{**record(each, []), "scenario": FAULT_FREE} for each in (NAN_REPEATED, NAN_REPEATED_HALF)]
    full = record(NAN_REPEATED, [2.0] * 12)
    cases: list[tuple[float, str, bool]] = [(2.1, "", True), (2.3, "", False), (2.0, "TrainingStopped", False)]
    for loss, ended, holds in cases:
        half = record(NAN_REPEATED_HALF, [loss] * 12, ended=ended)
        assert _aim(what, [*twins, full, half], []).holds is holds
    assert _aim(what, [*twins, full], []).holds is None


@pytest.mark.parametrize(
    ("more", "holds"),
    [({"skips": [7]}, True), ({"skips": [7, 9]}, False), ({"rollbacks": [7]}, False), ({"ended": "stopped"}, False)],
)
def test_a_healthy_run_may_drop_one_step(more: dict[str, Any], holds: bool) -> None:
    """Bugs: one dropped step per run allowed over all runs; a rollback counted as a dropped step."""
    from fault_suite.healthy_runs import HEALTHY_RUNS

    assert [seed for condition, seed, _ in HEALTHY_RUNS if condition.long_tailed] == [22, *range(30, 37)]
    condition, seed, _ = HEALTHY_RUNS[-2]
    made = {**record(SimpleNamespace(condition=condition, name=""), []), "seed": seed, **more}
    assert _aim(f"{condition.name}, seed {seed}", [], [made]).holds is holds
    assert _aim(f"{condition.name}, seed {seed}", [], []).holds is None


def test_a_peer_that_is_not_installed_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the benchmark ends with an ImportError where another project's package is missing."""
    import faults
    from fault_suite.contenders import Contender

    missing, there = Contender("missing", package="no_such_package"), Contender("there")
    assert faults.installed([missing, there]) == [there]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("missing: skipped")


def run(contender: Any, condition: Any, folder: Path, planned: Any = None) -> dict[str, Any]:
    from fault_suite import harness

    made: list[dict[str, Any]] = []
    harness.run(contender, condition, 0, (), made.append, folder, planned)
    return made[0]


def test_steps_are_counted_and_not_micro_batches(tmp_path: Path) -> None:
    """Bugs: every micro-batch in the middle of a window counted as a dropped step; a fault at a fourth of its step."""
    from fault_suite.contenders import CONTENDERS
    from fault_suite.injected import only
    from fault_suite.scenarios import Condition, Scenario

    from stabletrain import chaos

    condition = Condition("tiny", fault=20, steps=25, accumulate=2)
    fault = Scenario("NaN", 1, lambda at, seed: only(chaos.ScaledLoss(at), lambda step, micro: micro == 1), condition)
    contender = next(each for each in CONTENDERS if each.name == "SkipNonFinite")
    made = run(contender, condition, tmp_path, fault)
    assert not made["ended"]
    assert (made["attempts"], made["skips"], made["wasted"], len(made["losses"])) == (25, [20], 1, 1)


def test_peers_train_with_the_same_warm_up(tmp_path: Path) -> None:
    """Bug: another learning rate, so that a peer is compared in a different training."""
    from fault_suite.contenders import Contender
    from fault_suite.scenarios import Condition

    condition = Condition("tiny", fault=0, steps=25)
    ours, peer = (run(Contender("", package=package), condition, tmp_path) for package in ("", "torch"))
    assert ours["losses"] == peer["losses"]
    assert len(ours["losses"]) == 5


def test_seen_batches_are_the_healthy_ones() -> None:
    """Bug: the first bad batch counts as healthy, or the last healthy one as bad."""
    from fault_suite.injected import digest
    from fault_suite.scenarios import Condition, Scenario
    from fault_suite.trial import Trial

    condition = Condition("tiny", fault=3, steps=8)
    trial = Trial(condition, 0, [Scenario("", 1, None, condition)], torch.zeros(1))
    for step in range(5):
        trial.attempts = step
        trial.on_train_batch_start(None, None, torch.full((2,), step), step)  # type: ignore[arg-type]
    assert trial.seen == {digest(torch.full((2,), step)) for step in range(3)}
