"""Whole runs with rollbacks: what is restored, which batches come again, when the run stops."""

from __future__ import annotations

import csv
import json
import logging
import math
from pathlib import Path
from typing import Any

import going_back
import pytest
import torch
from fits import assert_same
from going_back import Sample, Samples
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import stabletrain as st
from stabletrain.chaos import BadGradient, LearningRateSurge
from stabletrain.errors import UserError
from stabletrain.runtime.stop import TrainingStopped
from stabletrain.testing.toy import quiet
from stabletrain.testing.trainer import quiet_trainer
from stabletrain_plugins.rollback import memory

QUICK: dict[str, Any] = {
    "every": 8,
    "trust_after": 4,
    "rewarm": 0,
    "window": 16,
    "delay": 2,
    "min_samples": 8,
    "patience": 4,
    "regime_after": 4,
    "cool_down": 8,
    "check_every": 4,
}


class Data(Samples):
    """The targets of some samples, the poisoned ones, are far off."""

    def __init__(self, poisoned: range = range(0), size: int = 256) -> None:
        super().__init__(size=size)
        self.poisoned = poisoned

    def __getitem__(self, index: int) -> Sample:
        x, y, _ = super().__getitem__(index)
        return x, y + 300.0 if index in self.poisoned else y, index


class Model(going_back.Model):
    """Records the samples of each attempted step, and sets a weight to a given value at given steps, once each.

    Without the metrics and logs of its base class, which would take longer than the training.
    """

    def __init__(self, damage: dict[int, float] | None = None, optimizer: str = "adamw") -> None:
        super().__init__(optimizer, dropout=0.1, scheduler=None)
        self.damage = dict(damage or {})
        self.samples: list[tuple[int, ...]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        value = self.damage.pop(len(self.samples), None)
        if value is not None:
            with torch.no_grad():
                self.net[0].weight[0, 0] = value
        self.samples.append(tuple(index.tolist()))
        return (self.net(x) - y).square().mean()


def train(
    folder: Path,
    *callbacks: Callback,
    poisoned: range = range(0),
    order: list[int] | None = None,
    damage: dict[int, float] | None = None,
    resume: Path | None = None,
    shuffle: bool = False,
    optimizer: str = "adamw",
    **options: Any,
) -> tuple[Model, Trainer]:
    torch.manual_seed(0)
    model = Model(damage, optimizer)
    loader: DataLoader[Sample] = DataLoader(Data(poisoned), 4, sampler=order, shuffle=shuffle)
    trainer = quiet_trainer(
        *callbacks, default_root_dir=folder, log_every_n_steps=1, limit_val_batches=0, **{"max_epochs": 1, **options}
    )
    with quiet():
        trainer.fit(model, loader, ckpt_path=resume)
    return model, trainer


def assert_same_weights(one: Model, other: Model) -> None:
    assert_same(one.state_dict(), other.state_dict())


def interventions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "interventions.jsonl").read_text().splitlines()]


class Requests(st.SkipNonFinite):  # type: ignore[name-defined,misc]
    """Requests a rollback after given attempted steps."""

    plugin = "requests"

    def at(self, *steps: int) -> Requests:
        self.__dict__["steps"] = steps
        return self

    def observe(self, state: Any, outcome: Any) -> Any:
        from stabletrain.core.events import Request, RequestKind
        from stabletrain.core.rule import Observation

        due = outcome.step + 1 in self.__dict__["steps"]
        request = Request(RequestKind.ROLLBACK, self.label, f"requested at step {outcome.step}")
        return Observation(state, (), (request,) if due else ())


POISON = range(4 * 40, 4 * 44)
"""Samples of the batches 40 to 43."""


def test_poisoned_batches_are_excluded(tmp_path: Path) -> None:
    """Bug: poisoned batches are trained on again, or other batches are excluded, or too many."""
    model, trainer = train(tmp_path, st.Rollback(**QUICK), poisoned=POISON)
    (made,) = interventions(tmp_path)
    excluded = {index for batch in made["excluded"] for index in batch[1:]}
    assert set(POISON) <= excluded
    assert len(excluded) <= 4 * 8
    clean = [i for i in range(256) if i not in excluded]
    assert not set(POISON) & {i for batch in model.samples[made["step"] :] for i in batch}
    reference, _ = train(tmp_path / "reference", order=clean)
    assert trainer.global_step == len(clean) // 4
    # the undone steps drew random numbers; the generators were restored, so dropout is the same too
    assert_same_weights(model, reference)


def test_a_rollback_that_excludes_nothing_changes_nothing(tmp_path: Path) -> None:
    """Bug: a restore that is not exact, at any of several steps."""
    reference, _ = train(tmp_path / "a", max_epochs=2, shuffle=True)
    callbacks = Requests().at(30, 35, 70, 120), st.Rollback(**{**QUICK, "drop": "none"})
    model, trainer = train(tmp_path / "b", *callbacks, max_epochs=2, shuffle=True)
    assert len(interventions(tmp_path / "b")) == 4
    assert_same_weights(model, reference)
    assert trainer.global_step == 128


@pytest.mark.parametrize("first", [True, False])
def test_an_outcome_in_flight_is_of_the_undone_steps(tmp_path: Path, first: bool) -> None:
    """Bug: in device mode, the outcome of an undone step is observed after the snapshot was restored."""
    reference, _ = train(tmp_path / "a", optimizer="fused")
    requests, rollback = Requests().at(30, 50), st.Rollback(**{**QUICK, "drop": "none"})
    members = (rollback, requests) if first else (requests, rollback)
    model, trainer = train(tmp_path / "b", st.Guard(mode="device"), *members, optimizer="fused")
    assert [each["step"] for each in interventions(tmp_path / "b")] == [31, 51]
    assert_same_weights(model, reference)
    assert trainer.global_step == 64


@pytest.mark.parametrize("accumulate", [1, 4])
def test_excluded_batches_are_as_if_never_in_the_data(tmp_path: Path, accumulate: int) -> None:
    """Bug: half an accumulation window is excluded, or later counts are wrong."""
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    quick = {**QUICK, "every": 4, "drop": "since_snapshot"}
    model, _ = train(tmp_path, Requests().at(13), st.Rollback(**quick), **options)
    (made,) = interventions(tmp_path)
    excluded = {index for batch in made["excluded"] for index in batch[1:]}
    reference, _ = train(tmp_path / "reference", order=[i for i in range(256) if i not in excluded], **options)
    assert excluded
    assert len(excluded) % (4 * accumulate) == 0
    assert_same_weights(model, reference)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_damaged_weights_are_detected_and_restored(tmp_path: Path, value: float) -> None:
    """Bug: with damaged weights every step is skipped, for ever."""
    reference, _ = train(tmp_path / "a")
    quick = {**QUICK, "drop": "none"}
    model, _ = train(tmp_path / "b", st.SkipNonFinite(), st.Rollback(**quick), damage={37: value})
    assert len(interventions(tmp_path / "b")) == 1
    assert_same_weights(model, reference)


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_damage_of_the_last_step_is_found(tmp_path: Path, mode: Any) -> None:
    """Bug: in device mode, norms that would be read at the next step are never compared, and the run ends damaged."""
    plugins = st.Guard(mode=mode), st.SkipNonFinite(), st.Rollback(**{**QUICK, "drop": "none"})
    model, _ = train(tmp_path, *plugins, damage={63: 1e30}, optimizer="fused")
    assert [each["step"] for each in interventions(tmp_path)] == [64]
    assert model.net[0].weight.abs().max() < 1e3


def test_in_the_first_steps_an_untrusted_snapshot_is_restored(tmp_path: Path) -> None:
    """Bug: a run whose first batches are NaN is stopped, though there are snapshots from before them."""
    skip, rollback = st.SkipNonFinite(max_in_a_row=3), st.Rollback(**{**QUICK, "trust_after": 8, "drop": "none"})
    model, _ = train(tmp_path / "b", skip, rollback, BadGradient(at_step=5, steps=3))
    (made,) = interventions(tmp_path / "b")
    assert (made["step"], made["to"]) == (8, 1)
    reference, _ = train(tmp_path / "a")
    assert_same_weights(model, reference)


def test_many_skips_in_a_row_lead_to_a_rollback(tmp_path: Path) -> None:
    """Bug: the request of another plugin stops the run although Rollback is installed."""
    skip = st.SkipNonFinite(max_in_a_row=3)
    bad = BadGradient(at_step=37, steps=3)
    model, _ = train(tmp_path / "b", skip, st.Rollback(**{**QUICK, "drop": "none"}), bad)
    (made,) = interventions(tmp_path / "b")
    assert made["plugin"] == "skip_nonfinite"
    reference, _ = train(tmp_path / "a")
    assert_same_weights(model, reference)


def test_after_an_unhealthy_step_the_weights_are_checked_at_once(tmp_path: Path) -> None:
    """Bug: a run skips step after step because of one damaged weight, until the next regular check."""
    train(tmp_path, st.SkipNonFinite(), st.Rollback(**{**QUICK, "check_every": 1000}), damage={37: math.nan})
    (made,) = interventions(tmp_path)
    assert made["plugin"] == "rollback"
    assert made["step"] <= 39


def test_a_request_does_not_hide_damaged_weights(tmp_path: Path) -> None:
    """Bug: weights are not checked in a step at which another plugin requests a rollback: a nearer snapshot is left, or
    a loss is accepted as a new level although the weights are damaged."""
    quick = {**QUICK, "every": 16, "trust_after": 16, "check_every": 2, "drop": "none"}
    train(tmp_path, Requests().at(38), st.SkipNonFinite(), st.Rollback(**quick), damage={37: 1e30})
    (made,) = interventions(tmp_path)
    assert (made["step"], made["plugin"], made["to"]) == (38, "requests", 32)


def test_a_surge_of_the_learning_rate_is_undone_at_its_first_step(tmp_path: Path) -> None:
    """Bug: a run goes on with damaged weights for ``patience`` steps."""
    quick = {**QUICK, "every": 16, "patience": 16, "check_every": 2, "max_growth": 1e4}
    surge = LearningRateSurge(at_step=50, factor=3000.0, steps=1)
    model, _ = train(tmp_path / "b", st.Rollback(**{**quick, "drop": "none"}), surge)
    (made,) = interventions(tmp_path / "b")
    assert "the weights have changed " in made["cause"]
    assert made["step"] <= 55
    reference, _ = train(tmp_path / "a")
    assert_same_weights(model, reference)


@pytest.mark.parametrize("second", [50, 56])
def test_a_repeated_incident_restores_an_older_snapshot(tmp_path: Path, second: int) -> None:
    """Bug: a loop between one snapshot and one incident; or a cool-down (8 steps) that ignores the undone steps.

    The first rollback, at step 44, undoes 4 steps: up to step 44 + 4 + 8, a request is taken for the same incident.
    """
    train(tmp_path, Requests().at(44, second), st.Rollback(**QUICK))
    made = interventions(tmp_path)
    assert [each["step"] for each in made] == [44, second]
    assert made[0]["to"] == 40
    assert [each["applied"][1] for each in made] == [40, 32]
    assert len(made[1]["excluded"]) > len(made[0]["excluded"])


def test_nothing_of_the_undone_steps_is_left(tmp_path: Path) -> None:
    """Bug: a snapshot of undone steps is restored later, an incident goes on, or restored weights count as damage."""
    rollback = st.Rollback(**QUICK)
    restored: list[int] = []

    class Checks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if rollback.rollbacks > len(restored):
                newest, samples = rollback._ring.newest, rollback._weights.history[:2]
                assert newest is not None
                assert newest.snapshot.step == rollback._interventions[-1].to
                assert rollback._incidents.current is None
                assert not any(each.norms for each in samples if each is not None)
                restored.append(newest.snapshot.step)

    train(tmp_path, Requests().at(50), rollback, Checks(), poisoned=POISON)
    assert restored == [each["to"] for each in interventions(tmp_path)]
    assert len(restored) == 2


def test_each_repetition_excludes_at_least_twice_as_many_batches(tmp_path: Path) -> None:
    """Bug: as many batches as the time before, which did not suffice."""
    train(tmp_path, Requests().at(44, 50, 56), st.Rollback(**QUICK))
    first, second, third = (len(each["excluded"]) for each in interventions(tmp_path))
    assert first == 0
    assert second >= 1
    assert third >= 2 * second


def test_the_budget_ends_in_a_clean_stop_with_a_diagnosis(tmp_path: Path) -> None:
    """Bug: a run is rolled back for ever, or stops without a diagnosis."""
    requests = Requests().at(40, 41, 42, 43)
    with pytest.raises(
        TrainingStopped, match=r"2 rollbacks did not help \(Rollback\(max_rollbacks=\.\.\.\)\); now: requested"
    ):
        train(tmp_path, requests, st.Rollback(**QUICK, max_rollbacks=2))
    folder = tmp_path / "diagnosis-42"
    report = json.loads((folder / "report.json").read_text())
    assert report["rollbacks_at"] == [40, 41]
    assert {row["parameter"] for row in report["largest_layers"]} == {
        f"net.{layer}.{kind}" for layer in (0, 1, 4) for kind in ("weight", "bias")
    }
    assert report["first_nonfinite_weight"] is None
    rows = list(csv.DictReader((folder / "outcomes.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(42))
    assert (folder / "plot.png").stat().st_size > 1000


def test_the_diagnosis_names_where_it_is_not_finite(tmp_path: Path) -> None:
    """Bug: the diagnosis names the last non-finite module instead of the first, or leaves hooks on the modules."""
    with pytest.raises(TrainingStopped, match=r"no snapshot to restore.*no checkpoint on disk"):
        train(tmp_path, st.Rollback(**QUICK), damage={0: math.nan})
    (folder,) = tmp_path.glob("diagnosis-*")
    report = json.loads((folder / "report.json").read_text())
    assert report["first_nonfinite_weight"] == "net.0.weight"
    assert report["first_nonfinite_output"] == "net.0"
    assert report["largest_layers"][0]["grad_norm"] == "nan"
    assert report["incident_since"] == 0
    assert report["batches_since"][0] == ["samples", 0, 1, 2, 3]


def test_replay_ends_in_the_same_weights(tmp_path: Path) -> None:
    """Bug: the log lacks something that is needed to make its interventions again."""
    first, _ = train(tmp_path / "a", Requests().at(60, 66), st.Rollback(**QUICK), poisoned=POISON, max_epochs=2)
    assert len(interventions(tmp_path / "a")) == 3
    # other snapshots and no requests: only the log decides
    again = st.Rollback(**{**QUICK, "every": 5}, replay=str(tmp_path / "a"))
    second, _ = train(tmp_path / "b", again, poisoned=POISON, max_epochs=2)
    assert_same_weights(first, second)
    assert first.samples == second.samples
    mine, theirs = interventions(tmp_path / "b"), interventions(tmp_path / "a")
    assert [each["step"] for each in mine] == [each["step"] for each in theirs]


def test_the_log_of_another_run_is_refused(tmp_path: Path) -> None:
    """Bug: interventions are made in a run that they do not belong to."""
    train(tmp_path / "a", Requests().at(40), st.Rollback(**QUICK))
    path = tmp_path / "a" / "interventions.jsonl"
    record = {**interventions(tmp_path / "a")[0], "model": "0"}
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=r"another model or optimizer.*Rollback\(replay=None\)"):
        train(tmp_path / "b", st.Rollback(**QUICK, replay=str(path)))
    with pytest.raises(UserError, match=r"replay='nowhere' cannot be read"):
        train(tmp_path / "b", st.Rollback(**QUICK, replay="nowhere"))
    path.write_text("hello\n")
    with pytest.raises(UserError, match=r"line 1 of .* is no intervention"):
        train(tmp_path / "b", st.Rollback(**QUICK, replay=str(path)))


def test_excluded_batches_stay_excluded_after_a_restart(tmp_path: Path) -> None:
    """Bug: a resumed run trains on the poisoned batches again."""
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=50, save_top_k=-1)
    model, _ = train(tmp_path, st.Rollback(**QUICK), save, poisoned=POISON, max_epochs=2)
    (made,) = interventions(tmp_path)
    excluded = {index for batch in made["excluded"] for index in batch[1:]}
    again, _ = train(
        tmp_path / "again",
        st.Rollback(**QUICK),
        poisoned=POISON,
        max_epochs=2,
        resume=tmp_path / "ckpt" / "step=50.ckpt",
    )
    second_epoch = {i for batch in again.samples for i in batch}
    assert not excluded & second_epoch
    assert len(second_epoch) == 256 - len(excluded)
    assert not excluded & {i for batch in model.samples[-40:] for i in batch}


def test_a_run_with_a_rollback_resumes_exactly(tmp_path: Path) -> None:
    """Bug: the saved data position ignores excluded batches."""
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=50, save_top_k=-1)
    stack = st.ResumeExactly(), st.Rollback(**QUICK), save
    whole, _ = train(tmp_path / "b", *stack, poisoned=POISON, max_epochs=2)
    assert len(interventions(tmp_path / "b")) == 1
    again = st.ResumeExactly(), st.Rollback(**QUICK)
    checkpoint = max((tmp_path / "ckpt").glob("step=50*.ckpt"), key=lambda path: path.stat().st_mtime)
    resumed, _ = train(tmp_path / "c", *again, poisoned=POISON, max_epochs=2, resume=checkpoint)
    assert_same_weights(whole, resumed)


def test_the_position_in_a_replaced_loader_is_not_restored(tmp_path: Path) -> None:
    """Bug: where each epoch has a new loader, a restore fails halfway, because the tape does not reach back."""
    requests, rollback = Requests().at(110), st.Rollback(**QUICK)
    options = {"reload_dataloaders_every_n_epochs": 1, "limit_train_batches": 60, "max_epochs": 3}
    train(tmp_path, requests, rollback, **options)
    (made,) = interventions(tmp_path)
    assert (made["to"], made["rewound"]) == (104, True)
    model, trainer = train(tmp_path / "b", Requests().at(63), st.Rollback(**QUICK), **options)
    (made,) = interventions(tmp_path / "b")
    assert (made["to"], made["rewound"]) == (56, False)
    assert model.samples[60:] == model.samples[:60] * 2, "the data go on"
    assert trainer.global_step == 180 - 7


def test_the_log_of_a_resumed_run_is_complete(tmp_path: Path) -> None:
    """Bug: the log in the folder of the resumed run lacks the interventions from before the restart."""
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=60, save_top_k=-1)
    stack = st.ResumeExactly(), st.Rollback(**QUICK)
    train(tmp_path / "a", *stack, save, poisoned=POISON, max_epochs=2)
    checkpoint = max((tmp_path / "ckpt").glob("step=60*.ckpt"), key=lambda path: path.stat().st_mtime)
    again = st.ResumeExactly(), st.Rollback(**QUICK), Requests().at(100)
    resumed, _ = train(tmp_path / "b", *again, poisoned=POISON, max_epochs=2, resume=checkpoint)
    assert [made["step"] for made in interventions(tmp_path / "b")] == [
        *(made["step"] for made in interventions(tmp_path / "a")),
        100,
    ]
    log = st.Rollback(**QUICK, replay=str(tmp_path / "b"))
    replayed, _ = train(tmp_path / "c", st.ResumeExactly(), log, poisoned=POISON, max_epochs=2)
    assert_same_weights(resumed, replayed)


def test_the_newest_checkpoint_is_used_after_a_restart(tmp_path: Path) -> None:
    """Bug: a run stops although there is a good checkpoint, or restores one with the damage in it."""
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=10, save_top_k=-1)
    train(tmp_path / "a", st.Rollback(**QUICK), save, max_steps=20, max_epochs=-1)
    resume = tmp_path / "ckpt" / "step=20.ckpt"
    callbacks = (
        Requests().at(24),
        st.Rollback(**{**QUICK, "trust_after": 8}),
        ModelCheckpoint(tmp_path / "ckpt", save_top_k=0),
    )
    model, trainer = train(tmp_path / "b", *callbacks, resume=resume, max_steps=30, max_epochs=-1)
    (made,) = interventions(tmp_path / "b")
    assert made["to"] is None
    assert made["checkpoint"] == str(resume)
    assert made["applied"] == [24, 20]
    assert trainer.global_step == 30
    assert len(model.samples) == 14, "four steps before, ten after"


def test_restoring_a_checkpoint_does_not_reset_the_budget(tmp_path: Path) -> None:
    """Bug: rollbacks and excluded batches become those of the checkpoint, so that it is restored for ever."""
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=10, save_top_k=-1)
    train(tmp_path / "a", st.Rollback(**QUICK), save, max_steps=20, max_epochs=-1)
    rollback = st.Rollback(**{**QUICK, "trust_after": 8}, max_rollbacks=2)
    callbacks = Requests().at(24, 26, 28), rollback, ModelCheckpoint(tmp_path / "ckpt", save_top_k=0)
    with pytest.raises(TrainingStopped, match="2 rollbacks did not help"):
        train(tmp_path / "b", *callbacks, resume=tmp_path / "ckpt" / "step=20.ckpt", max_steps=60, max_epochs=-1)
    made = interventions(tmp_path / "b")
    assert [each["applied"][1] for each in made] == [20, 10]
    assert rollback.rollbacks == 2
    assert rollback.excluded == {tuple(batch) for each in made for batch in each["excluded"]}


def test_rewarming(tmp_path: Path) -> None:
    """Bug: the learning rate is at its full height right after a rollback."""

    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_fit_start(self, trainer: Trainer, *_: Any) -> None:
            optimizer = trainer.optimizers[0]
            optimizer.register_step_pre_hook(lambda *_: self.seen.append(optimizer.param_groups[0]["lr"]))

    rates = Rates()
    train(tmp_path, Requests().at(40, 42), st.Rollback(**{**QUICK, "rewarm": 4}), rates)
    assert set(rates.seen[:40]) == set(rates.seen[45:]) == {1e-2}
    # a second rollback during the climb starts it again
    assert rates.seen[40:45] == pytest.approx([0.25e-2, 0.5e-2, 0.25e-2, 0.5e-2, 0.75e-2])


def test_memory_is_refused_before_it_is_taken(tmp_path: Path) -> None:
    """Bug: a run is killed by the system hours later, because memory runs out."""
    with pytest.raises(
        UserError, match=r"3 snapshots of .* and 48 batches of .* more than max_memory=1KB.*Rollback\(keep=..."
    ):
        train(tmp_path, st.Rollback(**QUICK, max_memory="1KB"))
    train(tmp_path, st.Rollback(**QUICK, max_memory="10MB"), max_steps=3, max_epochs=-1)


def test_without_max_memory_the_free_memory_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the default stack exhausts the memory of a machine that trains a large model."""
    monkeypatch.setattr(memory, "host_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"more than the 1 KB that are free.*default_callbacks\(spike=\"detect\"\)"):
        train(tmp_path, st.Rollback(**QUICK))
    train(tmp_path, st.Rollback(**QUICK, max_memory="10MB"), max_steps=3, max_epochs=-1)


def test_spilling_to_disk_is_the_same(tmp_path: Path) -> None:
    """Bug: the copies in files differ from the tensors, or the files stay behind."""
    quick = {**QUICK, "drop": "none"}
    reference, _ = train(tmp_path / "a")
    model, _ = train(tmp_path / "b", Requests().at(30, 50), st.Rollback(**quick, spill=str(tmp_path / "spill")))
    assert_same_weights(model, reference)
    assert not list((tmp_path / "spill").glob("*")) if (tmp_path / "spill").exists() else True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_rollbacks": 0}, "max_rollbacks must be >= 1; to detect without rollbacks, use default_callbacks"),
        ({"keep": 1}, "keep must be >= 2"),
        ({"every": 10}, "trust_after must be from 1 to every=10"),
        ({"max_memory": "much"}, r"Rollback\(max_memory=\.\.\.\): expected an amount of memory like '8GB'"),
        ({"drop": "all"}, "drop must be"),
        ({"max_growth": 1.0}, "max_growth must be > 1"),
        ({"on_slow_rise": "stop"}, 'on_slow_rise must be "report" or "rollback"'),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    """Bug: an argument that makes no sense is accepted."""
    with pytest.raises(UserError, match=message):
        st.Rollback(**arguments)


def test_a_run_shorter_than_every_is_no_reason_to_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: each short trial of a script begins with a warning about a default that costs it nothing."""
    with caplog.at_level(logging.WARNING, "stabletrain"):
        train(tmp_path, st.Rollback(every=1000), max_steps=3, max_epochs=-1)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_run_whose_layers_changed_stops_with_advice(tmp_path: Path) -> None:
    """Bug: a snapshot that no longer fits ends in a traceback, or in a message without a way out."""

    class Adds(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 41 and not hasattr(pl_module, "late"):
                pl_module.late = nn.BatchNorm1d(3)

    message = r"^rollback.*rollback: the snapshot of step 32 .*Resume from a checkpoint.*default_callbacks.*step 42"
    with pytest.raises(TrainingStopped, match=message):
        train(tmp_path, Adds(), Requests().at(43), st.Rollback(**QUICK))
    assert (tmp_path / "diagnosis-43" / "report.json").exists()
    assert not (tmp_path / "interventions.jsonl").exists()


def test_a_replay_refuses_a_checkpoint_that_was_replaced(tmp_path: Path) -> None:
    """Bug: a replay restores another state than the run that wrote the log, and ends in other weights."""
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=10, save_top_k=-1)
    train(tmp_path / "a", st.Rollback(**QUICK), save, max_steps=20, max_epochs=-1)
    resume = tmp_path / "ckpt" / "step=20.ckpt"
    rollback = st.Rollback(**{**QUICK, "trust_after": 8})
    train(tmp_path / "b", Requests().at(24), rollback, resume=resume, max_steps=30, max_epochs=-1)
    replay = {**QUICK, "replay": str(tmp_path / "b")}
    options: dict[str, Any] = {"max_steps": 30, "max_epochs": -1}
    train(tmp_path / "c", st.Rollback(**replay), resume=resume, **options)
    (tmp_path / "ckpt" / "step=10.ckpt").rename(resume)
    with pytest.raises(UserError, match=r"expected .*step=20\.ckpt to be of step 20.*got step 10.*Rollback\(replay="):
        train(tmp_path / "d", st.Rollback(**replay), **options)
