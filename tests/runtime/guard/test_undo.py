"""After a fit, optimizer, module and trainer have their own methods and attributes again; later fits start fresh."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import (
    HEALTHY,
    NAN_LOSS,
    Net,
    Recorder,
    assert_same,
    batches,
    everything,
    fit,
    loader,
    run,
    trainer,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger

from stabletrain import ClipNorm, Guard, SkipNonFinite

ITEMS = batches(HEALTHY, HEALTHY, NAN_LOSS, HEALTHY)


class Traces(Callback):
    """Records the attributes of all objects that a guard changes, when its fit begins."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = self.now(trainer, pl_module)

    @staticmethod
    def now(mine: Any, module: Any) -> dict[str, Any]:
        optimizer, connector = mine.optimizers[0], mine._checkpoint_connector
        return {
            "optimizer": {k: v for k, v in vars(optimizer).items() if k not in ("state", "_opt_called")},
            "step": optimizer.step,
            "module": {k: v for k, v in vars(module).items() if not k.startswith("_")},
            "connector": {k: v for k, v in vars(connector).items() if callable(v)},
        }


def members(mode: str = "exact") -> list[Any]:
    return [ClipNorm(max_norm=1e6), SkipNonFinite(), Recorder(), Guard(mode=mode)]


@pytest.mark.parametrize("raise_at", [None, 3])
@pytest.mark.parametrize(("scheduler", "mode"), [(None, "exact"), ("step", "exact"), (None, "device")])
def test_nothing_is_left_behind(scheduler: str | None, mode: str, raise_at: int | None) -> None:
    """Bugs: the step method that a torch scheduler had put there is lost; a hook switched off for ever."""
    traces, callbacks, module = Traces(), members(mode), Net("adamw-fused", scheduler)
    module.raise_at = raise_at
    mine = trainer(traces, *callbacks)
    if raise_at is None:
        run(mine, module, ITEMS)
    else:
        with pytest.raises(RuntimeError, match="own bug"):
            run(mine, module, ITEMS)
    assert traces.now(mine, module) == traces.before
    for callback in callbacks:
        assert not [key for key in vars(callback) if key.startswith("on_")]


def test_a_module_with_a_scheduler_hook_of_its_own() -> None:
    """Bug: an instance attribute of the user's that is deleted instead of put back."""
    module, calls = Net("adamw-fused", "step"), []

    def mine(scheduler: Any, metric: Any) -> None:
        calls.append(scheduler)
        scheduler.step()

    module.lr_scheduler_step = mine  # type: ignore[method-assign]
    fit(module, ITEMS, *members())
    assert module.lr_scheduler_step is mine
    assert len(calls) == 3


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_validate_test_and_predict_are_unchanged(what: str, tmp_path: Path) -> None:
    """Bug: a guard of an earlier fit that wakes up and logs; hooks installed where there is no training."""
    fresh = members()
    before = [of(c) for c in fresh]
    mine = trainer(*fresh, logger=False)
    call(mine, what, Net())
    assert [of(c) for c in fresh] == before
    used = members()
    mine = trainer(*used, logger=CSVLogger(tmp_path))
    run(mine, Net(), ITEMS)
    before = [of(c) for c in used]
    call(mine, what, mine.lightning_module)
    assert "stability/grad_norm" not in mine.callback_metrics
    assert [of(c) for c in used] == before


def of(callback: Any) -> dict[str, Any]:
    return {
        key: value for key, value in vars(callback).items() if key not in ("log", "log_dict")
    }  # which Lightning puts there


def call(mine: Any, what: str, module: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        getattr(mine, what)(module, loader(ITEMS), **({} if what == "predict" else {"verbose": False}))


def test_fit_twice_with_the_same_trainer_goes_on() -> None:
    """Bug: counters that restart while the trainer's global step goes on; two layers of wrappers."""
    callbacks = members()
    mine = trainer(*callbacks)
    run(mine, module := Net("adamw-fused"), ITEMS)
    mine.fit_loop.max_epochs = 2
    run(mine, module, ITEMS)
    assert mine.global_step == 6
    assert callbacks[0].state_dict()["counters"]["attempted"] == 8
    assert [o.step for o in callbacks[2].state] == list(range(8))


def test_a_new_trainer_starts_fresh() -> None:
    """Bug: the history of one run in the baseline of the next."""
    callbacks = members()
    first = everything(fit(Net("adamw-fused"), ITEMS, *callbacks))
    second = everything(fit(Net("adamw-fused"), ITEMS, *callbacks))
    assert_same(first, second)
    assert callbacks[0].state_dict()["counters"]["attempted"] == 4
    assert len(callbacks[2].state) == 4


def test_fast_dev_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an event log of a trial run."""
    monkeypatch.chdir(tmp_path)
    fit(Net(), batches(NAN_LOSS, NAN_LOSS), *members(), fast_dev_run=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module(backend: str) -> None:
    """Bug: buffers, hooks or schedule looked for on the wrapper instead of the module."""
    items = batches(HEALTHY, NAN_LOSS, HEALTHY)
    compiled = torch.compile(Net("adamw-fused", "step"), backend=backend)
    mine = everything(fit(compiled, items, *members()))  # type: ignore[arg-type]
    bare = torch.compile(Net("adamw-fused", "step"), backend=backend)
    theirs = everything(fit(bare, [items[0], items[2]]))  # type: ignore[arg-type]
    torch._dynamo.reset()
    assert_same(mine, theirs)


def test_averaged_weights_beside_it() -> None:
    """Bug: an average that takes in a dropped step's weights a second time."""
    mine, theirs = EMAWeightAveraging(decay=0.5), EMAWeightAveraging(decay=0.5)
    fit(Net("adamw-fused"), ITEMS, *members(), mine)
    fit(Net("adamw-fused"), [ITEMS[0], ITEMS[1], ITEMS[3]], theirs)
    assert_same(dict(mine._average_model.state_dict()), dict(theirs._average_model.state_dict()))  # type: ignore[union-attr]
