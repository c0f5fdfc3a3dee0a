"""What only going back can get wrong: where to, what comes again, when to stop."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import stabletrain as st
from stabletrain.chaos import BadGradient, LearningRateSurge
from stabletrain.errors import UserError
from stabletrain.runtime.stop import TrainingStopped
from stabletrain.testing.toy import quiet
from stabletrain_plugins.rollback import callback, memory

Sample = tuple[Tensor, Tensor, int]
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


class Data(Dataset[Sample]):
    """A regression, of which some samples are poisoned: their target is far away."""

    def __init__(self, poisoned: range = range(0), size: int = 256) -> None:
        self.x = torch.randn(size, 8, generator=torch.Generator().manual_seed(1))
        self.poisoned = poisoned

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Sample:
        y = self.x[index].sum().reshape(1)
        return self.x[index], y + 300.0 if index in self.poisoned else y, index


class Model(LightningModule):
    """A small network that writes down which samples it was trained on, and can be told to damage itself."""

    def __init__(self, damage: dict[int, float] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))
        self.samples: list[tuple[int, ...]] = []
        self.losses: list[float] = []
        self.damage = dict(damage or {})  # attempted step -> what a weight becomes, once

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        value = self.damage.pop(len(self.samples), None)
        if value is not None:
            with torch.no_grad():
                self.net[0].weight[0, 0] = value
        self.samples.append(tuple(index.tolist()))
        loss: Tensor = (self.net(x) - y).abs().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 3e-2)


def train(
    folder: Path,
    *callbacks: Callback,
    poisoned: range = range(0),
    order: list[int] | None = None,
    damage: dict[int, float] | None = None,
    resume: Path | None = None,
    shuffle: bool = False,
    make: type[Model] | None = None,
    **options: Any,
) -> tuple[Model, Trainer]:
    torch.manual_seed(0)
    model = (make or Model)(damage)
    loader: DataLoader[Sample] = DataLoader(Data(poisoned), 4, sampler=order, shuffle=shuffle)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        log_every_n_steps=1,
        **{"max_epochs": 1, **options},
    )
    with quiet():
        trainer.fit(model, loader, ckpt_path=resume)
    return model, trainer


def weights(model: Model) -> list[Tensor]:
    return [each.detach().clone() for each in model.state_dict().values()]


def same(one: Model, other: Model) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def interventions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "interventions.jsonl").read_text().splitlines()]


class Ask(st.SkipNonFinite):  # type: ignore[name-defined,misc]
    """Asks for a rollback after given attempted steps."""

    plugin = "ask"

    def at(self, *steps: int) -> Ask:
        self.__dict__["steps"] = steps
        return self

    def observe(self, state: Any, outcome: Any) -> Any:
        from stabletrain.core.events import Request, RequestKind
        from stabletrain.core.rule import Observation

        asks = outcome.step + 1 in self.__dict__["steps"]
        request = Request(RequestKind.ROLLBACK, self.label, f"asked at step {outcome.step}")
        return Observation(state, (), (request,) if asks else ())


POISON = range(4 * 40, 4 * 44)
"""Samples of the batches 40 to 43."""


def test_poisoned_batches_are_left_out(tmp_path: Path) -> None:
    # catches a rollback that replays the poison, or leaves out others, or more
    model, trainer = train(tmp_path, st.Rollback(**QUICK), poisoned=POISON)
    (made,) = interventions(tmp_path)
    excluded = {index for batch in made["excluded"] for index in batch[1:]}
    assert set(POISON) <= excluded
    assert len(excluded) <= 4 * 8
    clean = [i for i in range(256) if i not in excluded]
    assert not set(POISON) & {i for batch in model.samples[made["step"] :] for i in batch}
    reference, _ = train(tmp_path / "reference", order=clean)
    assert trainer.global_step == len(clean) // 4
    # the generators moved on with the steps that were undone, and were put back: dropout is the same too
    assert same(model, reference)


def test_without_leaving_out_nothing_happened(tmp_path: Path) -> None:
    # catches a rollback that is not exact: requests at several steps, in the middle of nothing
    reference, _ = train(tmp_path / "a", max_epochs=2, shuffle=True)
    callbacks = Ask().at(30, 35, 70, 120), st.Rollback(**{**QUICK, "drop": "none"})
    model, trainer = train(tmp_path / "b", *callbacks, max_epochs=2, shuffle=True)
    assert len(interventions(tmp_path / "b")) == 4
    assert same(model, reference)
    assert trainer.global_step == 128


@pytest.mark.parametrize("first", [True, False])
def test_decisions_on_the_device_come_a_step_late(tmp_path: Path, first: bool) -> None:
    # catches an outcome of the undone past that is observed after the snapshot was restored
    class Fused(Model):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 3e-2, fused=True)

    reference, _ = train(tmp_path / "a", make=Fused)
    ask, rollback = Ask().at(30, 50), st.Rollback(**{**QUICK, "drop": "none"})
    members = (rollback, ask) if first else (ask, rollback)
    model, trainer = train(tmp_path / "b", st.Guard(mode="device"), *members, make=Fused)
    assert [each["step"] for each in interventions(tmp_path / "b")] == [31, 51]
    assert same(model, reference)
    assert trainer.global_step == 64


@pytest.mark.parametrize("accumulate", [1, 4])
def test_dropping_is_never_having_had_them(tmp_path: Path, accumulate: int) -> None:
    # catches half windows that are left out, and counts that are off afterwards
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    quick = {**QUICK, "every": 4, "drop": "since_snapshot"}
    model, _ = train(tmp_path, Ask().at(13), st.Rollback(**quick), **options)
    (made,) = interventions(tmp_path)
    gone = {index for batch in made["excluded"] for index in batch[1:]}
    reference, _ = train(tmp_path / "reference", order=[i for i in range(256) if i not in gone], **options)
    assert gone
    assert len(gone) % (4 * accumulate) == 0
    assert same(model, reference)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_damaged_weights_are_noticed_and_repaired(tmp_path: Path, value: float) -> None:
    # catches damage that skipping alone turns into a standstill
    reference, _ = train(tmp_path / "a")
    quick = {**QUICK, "drop": "none"}
    model, _ = train(tmp_path / "b", st.SkipNonFinite(), st.Rollback(**quick), damage={37: value})
    assert len(interventions(tmp_path / "b")) == 1
    assert same(model, reference)


def test_many_skips_in_a_row_lead_back(tmp_path: Path) -> None:
    # catches a request of another plugin that nobody takes over
    skip = st.SkipNonFinite(max_in_a_row=3)
    bad = BadGradient(at_step=37, steps=3)
    model, _ = train(tmp_path / "b", skip, st.Rollback(**{**QUICK, "drop": "none"}), bad)
    (made,) = interventions(tmp_path / "b")
    assert made["plugin"] == "skip_nonfinite"
    reference, _ = train(tmp_path / "a")
    assert same(model, reference)


def test_after_an_unhealthy_step_the_weights_are_looked_at_at_once(tmp_path: Path) -> None:
    # catches a run that skips step after step because of one damaged weight, until the next look is due
    train(tmp_path, st.SkipNonFinite(), st.Rollback(**{**QUICK, "check_every": 1000}), damage={37: math.nan})
    (made,) = interventions(tmp_path)
    assert made["plugin"] == "rollback"
    assert made["step"] <= 39


def test_a_surge_of_the_learning_rate_is_undone_at_its_first_step(tmp_path: Path) -> None:
    # catches a run that skips or trains on with spoilt weights until patience is at its end
    quick = {**QUICK, "every": 16, "patience": 16, "check_every": 2, "max_growth": 1e4}
    surge = LearningRateSurge(at_step=50, factor=3000.0, steps=1)
    model, _ = train(tmp_path / "b", st.Rollback(**{**quick, "drop": "none"}), surge)
    (made,) = interventions(tmp_path / "b")
    assert "the weights have moved " in made["cause"]
    assert made["step"] <= 55
    reference, _ = train(tmp_path / "a")
    assert same(model, reference)


def test_trouble_at_the_same_place_leads_further_back(tmp_path: Path) -> None:
    # catches a loop between one snapshot and one wall
    train(tmp_path, Ask().at(60, 66), st.Rollback(**QUICK))
    first, second = interventions(tmp_path)
    assert second["applied"][1] < first["applied"][1]
    assert len(second["excluded"]) > len(first["excluded"])


def test_the_budget_ends_in_a_clean_stop_with_a_diagnosis(tmp_path: Path) -> None:
    # catches a run that goes back for ever, and one that ends without saying why
    ask = Ask().at(40, 41, 42, 43)
    with pytest.raises(TrainingStopped, match=r"2 rollbacks did not help \(plugins.spike.max_rollbacks\); now: asked"):
        train(tmp_path, ask, st.Rollback(**QUICK, max_rollbacks=2))
    folder = tmp_path / "diagnosis-42"
    report = json.loads((folder / "report.json").read_text())
    assert report["rollbacks_at"] == [40, 41]
    assert {row["parameter"] for row in report["largest_layers"]} == {
        "net.0.weight",
        "net.0.bias",
        "net.3.weight",
        "net.3.bias",
    }
    assert report["first_nonfinite_weight"] is None
    rows = list(csv.DictReader((folder / "outcomes.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(42))
    assert (folder / "plot.png").stat().st_size > 1000


def test_the_diagnosis_names_where_it_is_not_finite(tmp_path: Path) -> None:
    # catches a probe that names the last module instead of the first, or leaves its hooks behind
    with pytest.raises(TrainingStopped, match=r"no snapshot to go back to.*no checkpoint on disk"):
        train(tmp_path, st.Rollback(**QUICK), damage={0: math.nan})
    (folder,) = tmp_path.glob("diagnosis-*")
    report = json.loads((folder / "report.json").read_text())
    assert report["first_nonfinite_weight"] == "net.0.weight"
    assert report["first_nonfinite_output"] == "net.0"
    assert report["largest_layers"][0]["grad_norm"] == "nan"
    assert report["trouble_since"] == 0
    assert report["batches_since"][0] == ["samples", 0, 1, 2, 3]


def test_replay_ends_in_the_same_weights(tmp_path: Path) -> None:
    # catches an intervention that is not described well enough to be made again
    first, _ = train(tmp_path / "a", Ask().at(60, 66), st.Rollback(**QUICK), poisoned=POISON, max_epochs=2)
    assert len(interventions(tmp_path / "a")) == 3
    # another rhythm of snapshots, nobody who asks: the log decides
    again = st.Rollback(**{**QUICK, "every": 5}, replay=str(tmp_path / "a"))
    second, _ = train(tmp_path / "b", again, poisoned=POISON, max_epochs=2)
    assert same(first, second)
    assert first.samples == second.samples
    mine, theirs = interventions(tmp_path / "b"), interventions(tmp_path / "a")
    assert [each["step"] for each in mine] == [each["step"] for each in theirs]


def test_the_log_of_another_run_is_refused(tmp_path: Path) -> None:
    # catches interventions made where they mean nothing
    train(tmp_path / "a", Ask().at(40), st.Rollback(**QUICK))
    path = tmp_path / "a" / "interventions.jsonl"
    record = {**interventions(tmp_path / "a")[0], "model": "0"}
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=r"another model or optimizer.*plugins\.spike\.replay=null"):
        train(tmp_path / "b", st.Rollback(**QUICK, replay=str(path)))
    with pytest.raises(UserError, match=r"replay='nowhere' cannot be read"):
        train(tmp_path / "b", st.Rollback(**QUICK, replay="nowhere"))
    path.write_text("hello\n")
    with pytest.raises(UserError, match=r"line 1 of .* is no intervention"):
        train(tmp_path / "b", st.Rollback(**QUICK, replay=str(path)))


def test_left_out_batches_stay_out_after_a_restart(tmp_path: Path) -> None:
    # catches a resumed run that meets the poison again
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
    # catches a position in the data that forgets the batches left out
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=50, save_top_k=-1)
    stack = st.ResumeExactly(), st.Rollback(**QUICK), save
    whole, _ = train(tmp_path / "b", *stack, poisoned=POISON, max_epochs=2)
    assert len(interventions(tmp_path / "b")) == 1
    again = st.ResumeExactly(), st.Rollback(**QUICK)
    checkpoint = max((tmp_path / "ckpt").glob("step=50*.ckpt"), key=lambda path: path.stat().st_mtime)
    resumed, _ = train(tmp_path / "c", *again, poisoned=POISON, max_epochs=2, resume=checkpoint)
    assert same(whole, resumed)


def test_no_snapshot_reaches_back_into_another_loader(tmp_path: Path) -> None:
    # catches half a restore, ended by an error of the tape's, where each epoch has a loader of its own
    ask, rollback = Ask().at(110), st.Rollback(**QUICK)
    options = {"reload_dataloaders_every_n_epochs": 1, "limit_train_batches": 60, "max_epochs": 3}
    train(tmp_path, ask, rollback, **options)
    assert interventions(tmp_path)[0]["to"] > 60
    with pytest.raises(TrainingStopped, match="no snapshot to go back to"):
        train(tmp_path / "b", Ask().at(63), st.Rollback(**QUICK), **options)


def test_the_log_of_a_resumed_run_is_whole(tmp_path: Path) -> None:
    # catches a replay without what was done before the restart: the resumed run has another folder, and another log
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=60, save_top_k=-1)
    stack = st.ResumeExactly(), st.Rollback(**QUICK)
    train(tmp_path / "a", *stack, save, poisoned=POISON, max_epochs=2)
    checkpoint = max((tmp_path / "ckpt").glob("step=60*.ckpt"), key=lambda path: path.stat().st_mtime)
    again = st.ResumeExactly(), st.Rollback(**QUICK), Ask().at(100)
    resumed, _ = train(tmp_path / "b", *again, poisoned=POISON, max_epochs=2, resume=checkpoint)
    assert [made["step"] for made in interventions(tmp_path / "b")] == [
        *(made["step"] for made in interventions(tmp_path / "a")),
        100,
    ]
    log = st.Rollback(**QUICK, replay=str(tmp_path / "b"))
    replayed, _ = train(tmp_path / "c", st.ResumeExactly(), log, poisoned=POISON, max_epochs=2)
    assert same(resumed, replayed)


def test_the_newest_checkpoint_is_used_after_a_restart(tmp_path: Path) -> None:
    # catches a run that gives up with a good checkpoint beside it, or takes one from after the damage
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=10, save_top_k=-1)
    train(tmp_path / "a", st.Rollback(**QUICK), save, max_steps=20, max_epochs=-1)
    resume = tmp_path / "ckpt" / "step=20.ckpt"
    callbacks = (
        Ask().at(24),
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


def test_the_budget_is_not_given_back_by_a_checkpoint(tmp_path: Path) -> None:
    # catches a run that goes back to one checkpoint for ever, and forgets what it left out: both are in it, as of then
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=10, save_top_k=-1)
    train(tmp_path / "a", st.Rollback(**QUICK), save, max_steps=20, max_epochs=-1)
    rollback = st.Rollback(**{**QUICK, "trust_after": 8}, max_rollbacks=2)
    callbacks = Ask().at(24, 26, 28), rollback, ModelCheckpoint(tmp_path / "ckpt", save_top_k=0)
    with pytest.raises(TrainingStopped, match="2 rollbacks did not help"):
        train(tmp_path / "b", *callbacks, resume=tmp_path / "ckpt" / "step=20.ckpt", max_steps=60, max_epochs=-1)
    made = interventions(tmp_path / "b")
    assert [each["applied"][1] for each in made] == [20, 10]
    assert rollback.rollbacks == 2
    assert rollback.excluded == {tuple(batch) for each in made for batch in each["excluded"]}


def test_rewarming(tmp_path: Path) -> None:
    # catches a learning rate that jumps back to its full height
    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    quick = {**QUICK, "rewarm": 4}
    train(tmp_path, Ask().at(40), st.Rollback(**quick), st.ScheduleLR(kind="constant"), rates)
    assert rates.seen[39] == 3e-2
    assert rates.seen[40] < rates.seen[41] < rates.seen[42] < 3e-2
    assert rates.seen[46] == 3e-2


def test_memory_is_refused_before_it_is_taken(tmp_path: Path) -> None:
    # catches a run that is killed by the system hours later
    with pytest.raises(UserError, match=r"3 snapshots of .* and 24 batches of .* more than max_memory=1KB.*spike.keep"):
        train(tmp_path, st.Rollback(**QUICK, max_memory="1KB"))
    train(tmp_path, st.Rollback(**QUICK, max_memory="10MB"), max_steps=3, max_epochs=-1)


def test_without_a_limit_it_is_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # catches a default stack that takes a large model's machine down an hour after its first step
    monkeypatch.setattr(memory, "host_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"more than the 1 KB that are free.*plugins/spike=detect"):
        train(tmp_path, st.Rollback(**QUICK))
    train(tmp_path, st.Rollback(**QUICK, max_memory="10MB"), max_steps=3, max_epochs=-1)


def test_spilling_to_disk_is_the_same(tmp_path: Path) -> None:
    # catches copies in files that are not the tensors, and files that stay behind
    quick = {**QUICK, "drop": "none"}
    reference, _ = train(tmp_path / "a")
    model, _ = train(tmp_path / "b", Ask().at(30, 50), st.Rollback(**quick, spill=str(tmp_path / "spill")))
    assert same(model, reference)
    assert not list((tmp_path / "spill").glob("*")) if (tmp_path / "spill").exists() else True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_rollbacks": 0}, "max_rollbacks must be >= 1; to watch and never go back, use plugins/spike=detect"),
        ({"keep": 1}, "keep must be >= 2"),
        ({"every": 10}, "trust_after must be from 1 to every=10"),
        ({"max_memory": "much"}, r"plugins\.spike\.max_memory: expected an amount of memory like '8GB'"),
        ({"drop": "all"}, "drop must be"),
        ({"max_growth": 1.0}, "max_growth must be > 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    # catches an argument that is taken and means nothing
    with pytest.raises(UserError, match=message):
        st.Rollback(**arguments)


def test_a_run_shorter_than_every_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # catches a protection that silently is none
    said: list[str] = []
    monkeypatch.setattr(callback.logger, "warning", said.append)
    train(tmp_path, st.Rollback(every=1000), max_steps=3, max_epochs=-1)
    assert said == [
        "rollback: every=1000 is more than the 3 steps of this run: there will be one snapshot, of the first step. "
        "Choose a smaller plugins.spike.every"
    ]
