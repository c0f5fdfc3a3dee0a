"""The learning rate that is used: by every kind of curve, beside other schedulers, across resumes and rollbacks."""

import copy
import itertools
import logging
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import fits
import pytest
import torch
from fits import HEALTHY, NAN_LOSS, Batch, batches, loader
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from stabletrain import default_callbacks
from stabletrain.config.discovery import content, groups
from stabletrain.core.lengths import RunLength
from stabletrain.core.schedule import Kind, Schedule
from stabletrain.errors import UserError
from stabletrain.runtime.guard.callbacks import as_callback
from stabletrain.runtime.guard.options import Guard
from stabletrain.testing.trainer import quiet_trainer
from stabletrain_plugins.clip_norm.rule import ClipNormRule
from stabletrain_plugins.schedule_lr.schedule import ScheduleLR
from stabletrain_plugins.skip_nonfinite.rule import SkipNonFiniteRule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`:UserWarning"),
]
BASE = 0.01
CONF = Path(__file__).parent / "conf" / "schedule"


class Net(fits.Net):
    """Two parameter groups; records the learning rates that each step used."""

    def __init__(
        self, scheduler: Callable[[Any], Any] | None = None, make: Callable[..., Any] = torch.optim.SGD
    ) -> None:
        super().__init__()
        self.make_scheduler, self.make_optimizer = scheduler, make
        self.used: list[tuple[float, ...]] = []

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[:4].parameters()}, {"params": self.net[4].parameters(), "lr": BASE * 10}]
        optimizer = self.make_optimizer(groups, lr=BASE)
        optimizer.register_step_post_hook(
            lambda opt, *_: self.used.append(tuple(float(group["lr"]) for group in opt.param_groups))
        )
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": "step"}]


def data(*faults: int) -> Any:
    """A loader with a batch for each fault, by default 8 healthy ones."""
    return loader(batches(*(faults or [HEALTHY] * 8)))


def trainer(tmp_path: Path, *callbacks: Callback, **arguments: Any) -> Trainer:
    return quiet_trainer(*callbacks, **{"max_epochs": 2, "default_root_dir": tmp_path, **arguments})


def wanted(schedule: Schedule, total: int, steps: range | None = None, **known: Any) -> list[tuple[float, ...]]:
    curve = schedule.curve(RunLength(total_steps=total, **known))
    return [(BASE * curve.factor(step), BASE * 10 * curve.factor(step)) for step in steps or range(total)]


def option(name: str) -> dict[str, Any]:
    arguments = content(groups()["schedule"][name])
    assert arguments.pop("_target_") == "stabletrain.ScheduleLR"
    return arguments


# ---- the rate that is used ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_option_trains_on_exactly_its_curve(tmp_path: Path, kind: str) -> None:
    """Bug: the rate is one step late or early, or rounded; a second parameter group has the first one's rate."""
    schedule, net = ScheduleLR(**option(kind)), Net()
    trainer(tmp_path, schedule, max_steps=16).fit(net, data())
    assert net.used == wanted(schedule, 16)
    assert all(0 < rate <= BASE for rate, _ in net.used)
    assert schedule.kind == kind


@pytest.mark.parametrize(
    ("arguments", "total"),
    [
        ({"max_epochs": 3}, 24),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 9),  # 8 batches: windows of 3, 3 and 2
        ({"max_epochs": 3, "limit_train_batches": 5}, 15),
        ({"max_steps": 11, "max_epochs": -1}, 11),
        ({"max_steps": 11, "max_epochs": 9}, 11),
        ({"max_steps": 1000, "max_epochs": 2}, 16),
        ({"max_steps": 1, "max_epochs": -1}, 1),
    ],
)
def test_the_total_is_that_of_the_run(tmp_path: Path, arguments: dict[str, Any], total: int) -> None:
    """Bug: a total that forgets max_steps, limits on batches, or a shorter last accumulation window."""
    schedule, net = ScheduleLR("cosine"), Net()
    trainer(tmp_path, schedule, **arguments).fit(net, data())
    assert len(net.used) == total
    assert net.used == wanted(schedule, total)


def test_the_total_follows_an_accumulation_that_changes_between_epochs(tmp_path: Path) -> None:
    """Bug: the window of the first epoch is taken for all epochs, as in Lightning's own estimate."""
    schedule, net = ScheduleLR("linear", lr_warmup=0), Net()
    trainer(tmp_path, schedule, GradientAccumulationScheduler({0: 1, 1: 4}), max_epochs=3).fit(net, data())
    assert net.used == wanted(schedule, 8 + 2 + 2)


def test_lengths_in_epochs_and_tokens(tmp_path: Path) -> None:
    """Bug: epochs or tokens are turned into a wrong number of steps."""
    schedule = ScheduleLR("wsd", lr_warmup="0.5ep", decay="600tok", tokens_per_step=100)
    net = Net()
    trainer(tmp_path, schedule).fit(net, data())
    assert net.used == wanted(ScheduleLR("wsd", lr_warmup=4, decay=6), 16)


class Endless(IterableDataset[Batch]):
    def __iter__(self) -> Iterator[Batch]:
        return itertools.repeat(batches(HEALTHY)[0])


def test_data_without_a_length_need_a_total_only_where_the_curve_has_an_end(tmp_path: Path) -> None:
    """Bug: an endless stream is refused for every curve, or accepted for one that needs the total."""
    endless = DataLoader(Endless(), batch_size=None)
    net = Net()
    trainer(tmp_path, ScheduleLR(lr_warmup=4), max_epochs=1, max_steps=6).fit(net, endless)
    assert [rate for rate, _ in net.used] == pytest.approx([BASE * f for f in (0.25, 0.5, 0.75, 1, 1, 1)])
    with pytest.raises(UserError, match=r"lr_warmup: 2% cannot be turned .* set trainer.max_steps"):
        trainer(tmp_path, ScheduleLR()).fit(Net(), endless)
    with pytest.raises(UserError, match=r"kind='cosine' needs the length of the run"):
        trainer(tmp_path, ScheduleLR("cosine", lr_warmup=4)).fit(Net(), endless)


def test_the_final_value_is_held_after_an_explicit_total(tmp_path: Path) -> None:
    """Bug: after ``total`` the rate rises again, or falls below min_factor."""
    net = Net()
    trainer(tmp_path, ScheduleLR("linear", lr_warmup=0, total=8, min_factor=0.5)).fit(net, data())
    assert [rate for rate, _ in net.used[8:]] == [BASE / 2] * 8


def test_a_tensor_rate_is_filled_not_replaced(tmp_path: Path) -> None:
    """Bug: a float replaces the tensor, which capturable and compiled optimizers go on using, or recompile for."""
    schedule = ScheduleLR("linear", lr_warmup=2)
    net = Net(make=lambda groups, lr: torch.optim.AdamW(groups, lr=torch.tensor(lr, dtype=torch.float64)))
    run = trainer(tmp_path, schedule)
    rate: list[Tensor] = []

    class ReadRate(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            rate.append(trainer.optimizers[0].param_groups[0]["lr"])

    run.callbacks.append(ReadRate())  # type: ignore[attr-defined]
    run.fit(net, data())
    assert run.optimizers[0].param_groups[0]["lr"] is rate[0]
    assert [each[0] for each in net.used] == [each[0] for each in wanted(schedule, 16)]


# ---- the applied step is what counts --------------------------------------------------------------------------------


FOUR_SKIPPED = [NAN_LOSS if i in (0, 3, 4, 15) else HEALTHY for i in range(16)]


@pytest.mark.parametrize("order", [1, -1])
def test_a_skipped_step_does_not_advance_the_schedule(tmp_path: Path, order: int) -> None:
    """Bug: the schedule counts attempted steps, or its own position in the list decides what it counts."""
    skip, schedule = as_callback(SkipNonFiniteRule)(), ScheduleLR("linear", lr_warmup=0, total=16)
    net = Net()
    run = trainer(tmp_path, *[skip, schedule][::order], max_epochs=1)
    run.fit(net, data(*FOUR_SKIPPED))
    assert run.global_step == 12
    assert net.used == wanted(schedule, 16, range(12))


@pytest.mark.parametrize("order", [1, -1])
def test_a_step_skipped_on_the_device_does_not_advance_it_either(tmp_path: Path, order: int) -> None:
    """Bug: the position advances, because the host knows of the skip only when the next backward is queued."""

    def fused(groups: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=lr, fused=True)

    schedule = ScheduleLR("linear", lr_warmup=0, total=16)
    net = Net(make=fused)
    members = [as_callback(SkipNonFiniteRule)(), schedule, Guard(mode="device")]
    run = trainer(tmp_path, *members[::order], max_epochs=1)
    run.fit(net, data(*FOUR_SKIPPED))
    skipped_calls = {0, 3, 4, 15}  # the kernel is called for these as well, and does nothing
    assert run.global_step == 12
    assert [rates for call, rates in enumerate(net.used) if call not in skipped_calls] == wanted(
        schedule, 16, range(12)
    )


@pytest.mark.parametrize("guarded", [False, True])
def test_resumed_equals_uninterrupted(tmp_path: Path, guarded: bool) -> None:
    """Bug: the position is not saved; or the decayed rate of the checkpoint becomes the base rate."""

    def parts() -> list[Callback]:
        return [ScheduleLR("wsd", lr_warmup=3), *([as_callback(ClipNormRule)(max_norm=0.5)] if guarded else [])]

    whole, saved, resumed = Net(), Net(), Net()
    trainer(tmp_path, *parts(), max_epochs=4).fit(whole, data())
    save = ModelCheckpoint(dirpath=tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    trainer(tmp_path, *parts(), save, max_epochs=4).fit(saved, data())
    trainer(tmp_path, *parts(), max_epochs=4).fit(resumed, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert saved.used == whole.used
    assert resumed.used == whole.used[16:]


def test_a_checkpoint_made_without_it_resumes_at_the_position_of_its_step(tmp_path: Path) -> None:
    """Bug: the schedule starts over and warms up again, or takes the saved rate for its base and decays twice."""
    save = ModelCheckpoint(dirpath=tmp_path, filename="plain")
    trainer(tmp_path, save, max_epochs=1).fit(Net(scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1)), data())
    schedule, net = ScheduleLR("cosine"), Net()
    trainer(tmp_path, schedule).fit(net, data(), ckpt_path=tmp_path / "plain.ckpt")
    assert net.used == wanted(schedule, 16, range(8, 16))


def test_a_jump_of_the_rate_at_a_resume_gets_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: another total at a resume changes the rate, and nobody notices; or a warning without a change."""
    save = ModelCheckpoint(dirpath=tmp_path, filename="half")
    trainer(tmp_path, ScheduleLR("linear", total=16), save, max_epochs=1).fit(Net(), data())
    trainer(tmp_path, ScheduleLR("linear", total=16)).fit(Net(), data(), ckpt_path=tmp_path / "half.ckpt")
    assert "not the checkpoint's" not in caplog.text
    trainer(tmp_path, ScheduleLR("linear", total=32)).fit(Net(), data(), ckpt_path=tmp_path / "half.ckpt")
    assert "at step 8 the learning rate was 0.5333 of the base rate, now it is 0.7742" in caplog.text


# ---- beside others --------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: (step + 1) / 100),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [BASE, BASE * 10], total_steps=99),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guarded", [False, True])
def test_replaces_the_modules_scheduler_and_restores_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, guarded: bool
) -> None:
    schedule, net = ScheduleLR("cosine"), Net(SCHEDULERS[name])
    run = trainer(tmp_path, *([as_callback(ClipNormRule)()] if guarded else []), schedule)
    run.fit(net, data())
    # LambdaLR's constructor has set the rate to a hundredth, OneCycleLR's also `initial_lr`
    assert net.used == wanted(schedule, 16)
    assert caplog.text.count(f"replaces the module's own scheduler ({name})") == 1
    assert [type(config.scheduler).__name__ for config in run.lr_scheduler_configs] == [name]


def test_the_default_stack_keeps_the_modules_scheduler(tmp_path: Path) -> None:
    """Bug: an unmodified script trains at a constant rate because default_callbacks() was added."""
    alone, net = Net(SCHEDULERS["StepLR"]), Net(SCHEDULERS["StepLR"])
    trainer(tmp_path).fit(alone, data())
    trainer(tmp_path, *default_callbacks()).fit(net, data())
    assert net.used == alone.used


class SetByHand(Net):
    def on_train_epoch_start(self) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.5


def averaging() -> Callback:
    return StochasticWeightAveraging(0.5, swa_epoch_start=1, annealing_epochs=1)


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize(
    ("make", "other", "text"),
    [
        (SetByHand, None, "are overwritten (0.5 after step 0, for example)"),
        (Net, averaging, "are overwritten (those of StochasticWeightAveraging)"),
    ],
)
def test_rates_that_others_set_are_overwritten_and_that_is_said_once(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[], Net],
    other: Callable[[], Callback] | None,
    text: str,
    guarded: bool,
) -> None:
    """Bug: rates set by hand or by weight averaging are overwritten after every step without a word, or with many."""
    schedule, net = ScheduleLR("cosine"), make()
    others = [*([as_callback(ClipNormRule)()] if guarded else []), *([other()] if other else [])]
    trainer(tmp_path, *others, schedule, max_epochs=3).fit(net, data())
    assert [rate for rate, _ in net.used] == pytest.approx([BASE * schedule.factor(i) for i in range(len(net.used))])
    (record,) = [each for each in caplog.records if each.name == "stabletrain"]
    assert text in record.getMessage()
    assert 'default_callbacks(schedule="none")' in record.getMessage()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("guarded", [False, True])
def test_learning_rate_monitor_and_our_own_log_see_the_rate_that_is_used(
    tmp_path: Path, order: int, guarded: bool
) -> None:
    """Bug: the logged rate is that of the step before or after."""
    logger = CSVLogger(tmp_path)
    parts = [LearningRateMonitor(), ScheduleLR("cosine"), *([as_callback(ClipNormRule)()] if guarded else [])][::order]
    net = Net()
    trainer(tmp_path, *parts, logger=logger, log_every_n_steps=1, accumulate_grad_batches=2).fit(net, data())
    header, *lines = [line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    columns = [dict(zip(header, line, strict=True)) for line in lines]
    monitored = {row["step"]: float(row["lr-SGD/pg1"]) for row in columns if row["lr-SGD/pg1"]}
    ours = {row["step"]: float(row["stability/lr"]) for row in columns if row["stability/lr"]}
    assert list(monitored.values()) == list(ours.values()) == [rate for rate, _ in net.used]
    assert list(monitored) == list(ours) == [str(step) for step in range(8)]


def test_our_log_keeps_the_trainers_interval(tmp_path: Path) -> None:
    """Bug: the rate is logged at every step, whatever ``log_every_n_steps`` is."""
    logger = CSVLogger(tmp_path)
    net = Net()
    trainer(tmp_path, ScheduleLR("linear"), logger=logger, log_every_n_steps=4).fit(net, data())
    lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    assert [float(line.split(",")[0]) for line in lines[1:]] == [net.used[step][0] for step in (3, 7, 11, 15)]


def test_several_optimizers_in_manual_optimization(tmp_path: Path) -> None:
    """Bug: only the first optimizer follows the schedule, or all of them get the first one's rate."""

    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.rates: list[list[float]] = []

        def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
            optimizers = self.optimizers()
            self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])  # type: ignore[union-attr]
            self.manual_backward(self.net(batch[0]).square().mean())
            for optimizer in optimizers:  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[:4].parameters(), 1.0), torch.optim.SGD(self.net[4].parameters(), 0.5)]

    net = Manual()
    trainer(tmp_path, ScheduleLR("linear", lr_warmup=0, total=32)).fit(net, data())
    # global_step counts each optimizer's step there, and so does the schedule
    assert net.rates == [[1 - 2 * step / 32, 0.5 * (1 - 2 * step / 32)] for step in range(16)]


# ---- the life of a callback -----------------------------------------------------------------------------------------


def test_two_fits_in_a_row_start_from_the_base_rate(tmp_path: Path) -> None:
    schedule = ScheduleLR("cosine")
    for _ in range(2):
        net = Net()
        run = trainer(tmp_path, schedule)
        run.fit(net, data())
        assert net.used == wanted(schedule, 16)
    # the same Trainer continues, with the same optimizer: its decayed rate must not become the base rate
    once = run.optimizers[0]
    net.configure_optimizers = lambda: once  # type: ignore[method-assign]
    net.used.clear()
    run.fit_loop.max_epochs = 4
    run.fit(net, data())
    assert net.used == wanted(schedule, 32, range(16, 32))
    assert [group["lr"] for group in once.param_groups] == [BASE, BASE * 10]


def test_after_an_exception_scheduler_and_rate_are_restored(tmp_path: Path) -> None:
    """Bug: after a failed fit, the module's scheduler is missing, and the optimizer has our rate."""
    net = Net(SCHEDULERS["StepLR"])
    net.raise_at = 5
    run = trainer(tmp_path, ScheduleLR("cosine"))
    with pytest.raises(RuntimeError, match="own bug"):
        run.fit(net, data())
    assert len(run.lr_scheduler_configs) == 1
    assert run.optimizers[0].param_groups[0]["lr"] == BASE


@pytest.mark.parametrize(
    "arguments", [{"kind": "cosine", "lr_warmup": 100}, {"kind": "wsd", "lr_warmup": 9, "decay": 9}]
)
def test_fast_dev_run_takes_lengths_that_its_few_batches_cannot_hold(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """Bug: a trial run of two batches is refused, because the warm-up is longer."""
    net = Net()
    trainer(tmp_path, ScheduleLR(**arguments), fast_dev_run=2).fit(net, data())
    assert [rate for rate, _ in net.used] == pytest.approx([BASE * s / arguments["lr_warmup"] for s in (1, 2)])


def test_validate_and_test_do_not_change_the_schedule(tmp_path: Path) -> None:
    """Bug: validation outside of a fit sets rates, advances or resets the schedule."""
    schedule, net = ScheduleLR("cosine"), Net()
    run = trainer(tmp_path, schedule)
    run.validate(net, data(), verbose=False)
    run.fit(net, data(), data())
    used = copy.deepcopy(net.used)
    state = schedule.state_dict()
    run.validate(net, data(), verbose=False)
    run.test(net, data(), verbose=False)
    assert used == net.used == wanted(schedule, 16)
    assert schedule.state_dict() == state


def test_pickles_and_copies_keep_the_arguments(tmp_path: Path) -> None:
    """Bug: a copy has the defaults, or shares state with the original."""
    schedule = ScheduleLR("step", milestones=[3, "1ep"])
    trainer(tmp_path, schedule).fit(Net(), data())
    for other in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        net = Net()
        trainer(tmp_path, other).fit(net, data())
        assert net.used == wanted(schedule, 16, steps_per_epoch=8)


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", get_args(Kind))
def test_options_list_every_argument_and_change_only_what_the_kind_needs(name: str) -> None:
    """Bug: an option file lacks an argument, or has other defaults than the code."""
    given = option(name)
    defaults = {field.name: field.default for field in fields(Schedule)}
    assert list(given) == list(defaults)
    given["milestones"] = tuple(given["milestones"])
    changed = {key for key, value in given.items() if value != defaults[key]}
    expected = {"one_cycle": {"lr_warmup"}, "cyclical": {"lr_warmup", "min_factor"}}.get(name, set())
    assert changed - {"kind"} == expected
    assert given["kind"] == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cosin"}, r"kind must be one of constant, .*got 'cosin'"),
        ({"tail": "sqrt"}, "tail must be one of linear, cosine, 1-sqrt"),
        ({"kind": "cosine", "cycles": 3}, "cycles=3 has no effect with kind='cosine'; it belongs to cosine_restarts"),
        ({"kind": "wsd", "lr_warmup": "90%"}, "lr_warmup='90%' and decay='20%' together are longer than the whole run"),
        ({"kind": "linear", "lr_warmup": 20, "total": 10}, "lr_warmup must be no longer than the total of 10 steps"),
        ({"kind": "cyclical"}, "min_factor must be above 0"),
        ({"kind": "inverse_sqrt", "lr_warmup": 0}, "without a warm-up needs a timescale"),
        ({"lr_warmup": "10ba"}, "schedule.lr_warmup: expected 500"),
        ({"lr_warmup": "1e6tok"}, "set tokens_per_step"),
        ({"kind": "step", "gamma": 2.0}, "gamma must be above 0 and at most 1"),
    ],
)
def test_a_mistake_is_reported_at_once_with_its_key(arguments: dict[str, Any], message: str) -> None:
    """Bug: a wrong argument is found only when the run starts, or by a message without its key."""
    with pytest.raises(UserError, match=message) as error:
        ScheduleLR(**arguments)
    assert re.search(r"schedule\.|ScheduleLR\(", str(error.value))


def test_a_warm_up_longer_than_the_run_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Bug: a run that never reaches its rate is accepted."""
    net = Net()
    with pytest.raises(UserError, match=r"lr_warmup must be no longer than the total of 16 steps, got 100"):
        trainer(tmp_path, ScheduleLR("cosine", lr_warmup=100)).fit(net, data())
    assert not net.used


@pytest.mark.parametrize("milestones", [[10, "1ep"], [1, 10]])
def test_milestones_out_of_order_or_inside_the_warm_up_are_refused(milestones: list[int | str]) -> None:
    """Bug: milestones in epochs and steps are not compared, and the rate falls at unexpected steps."""
    with pytest.raises(UserError, match="milestones must be ascending and after the warm-up of 2 steps"):
        ScheduleLR("step", milestones=milestones).curve(RunLength(total_steps=100, steps_per_epoch=5))


def test_lengths_in_several_units_are_compared_when_the_run_is_known() -> None:
    # 3 epochs may be shorter than 100 steps
    curve = ScheduleLR("linear", lr_warmup="3ep", total=100).curve(RunLength(steps_per_epoch=20))
    assert curve.factor(59) == 1.0


def test_a_run_that_is_all_warm_up_is_one() -> None:
    """Bug: a decay of length 0 divides by zero, or ends below the full rate."""
    curve = ScheduleLR("cosine", lr_warmup=4, total=4).curve(RunLength())
    assert [curve.factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("kind", get_args(Kind))
def test_plot_draws_the_curve(tmp_path: Path, kind: str) -> None:
    """Bug: the plot shows another curve than training uses."""
    schedule = ScheduleLR(**option(kind))
    figure = schedule.plot(tmp_path / "curve.png", steps=100)
    line = figure.axes[0].lines[0]
    curve = schedule.curve(RunLength(total_steps=100))
    assert list(line.get_ydata()) == [curve.factor(step) for step in range(100)]
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_plot_needs_a_length_and_knows_it_after_a_run(tmp_path: Path) -> None:
    """Bug: a traceback where the length is unknown; the length of the run is forgotten."""
    schedule = ScheduleLR("linear")
    with pytest.raises(UserError, match=r"trainer.max_steps|plot\(steps=...\)"):
        schedule.plot()
    trainer(tmp_path, schedule).fit(Net(), data())
    assert list(schedule.plot().axes[0].lines[0].get_ydata()) == [rate for rate, _ in wanted(schedule, 16)]


def test_no_warnings_without_a_cause(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a warning in an ordinary run."""
    with caplog.at_level(logging.WARNING, logger="stabletrain"):
        trainer(tmp_path, ScheduleLR("cosine")).fit(Net(), data())
    assert not caplog.records
