"""Schedule-free optimizers under Lightning: which weights are evaluated, saved and trained, compared bit by bit."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEALTHY, NAN_LOSS, Net, SaveAfter, assert_same, batches, everything, fit, loader, run, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

from stabletrain import ResumeExactly, SaveCheckpoints, ScheduleLR, SkipNonFinite, SwitchScheduleFree, UserError
from stabletrain.runtime.checkpoints.loading import read, store_of
from stabletrain.runtime.checkpoints.store import Store
from stabletrain.runtime.internals.packages import Callback

schedulefree = pytest.importorskip("schedulefree")
ITEMS = batches(*[HEALTHY] * 8)
OPTIMIZERS = {
    "adamw": lambda p: schedulefree.AdamWScheduleFree(p, 0.05, foreach=False),
    "sgd": lambda p: schedulefree.SGDScheduleFree(p, 0.05),
}


class Free(Net):
    """Records in every step of any kind which weights the model has."""

    def __init__(self, kind: str = "adamw", norm: bool = False, raise_in_validation: bool = False) -> None:
        super().__init__(norm=norm)
        self.kind, self.raise_in_validation = kind, raise_in_validation
        self.seen: list[tuple[str, bool, Tensor]] = []

    def note(self, where: str) -> None:
        optimizer: Any = self.trainer.optimizers[0] if self.trainer.optimizers else None
        mode = bool(optimizer and optimizer.param_groups[0]["train_mode"])
        self.seen.append((where, mode, self.net[0].weight.detach().clone()))

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.kind](self.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.note("train")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.note("sanity" if self.trainer.sanity_checking else "validate")
        if self.raise_in_validation and not self.trainer.sanity_checking:
            raise RuntimeError("the module's own bug")
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.note("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.note("predict")
        return super().predict_step(batch, batch_idx)


def reference(kind: str, items: Any) -> tuple[list[Tensor], list[Tensor], Free]:
    """A loop in plain torch: the first layer's trained weights before each step, and its average after each."""
    module = Free(kind)
    optimizer = module.configure_optimizers()
    module.note = lambda where: None  # type: ignore[method-assign]
    before, averages = [], []
    optimizer.train()
    for i, item in enumerate(items):
        before.append(module.net[0].weight.detach().clone())
        optimizer.zero_grad()
        Net.training_step(module, item, i).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        copied = copy.deepcopy({"module": module.net, "optimizer": optimizer})
        copied["optimizer"].eval()
        averages.append(copied["module"][0].weight.detach().clone())
    return before, averages, module


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_train_one_set_of_weights_and_everything_else_has_the_average(kind: str, tmp_path: Path) -> None:
    """Bugs: the trained weights are validated or saved; validation or a save moves the training by a rounding."""
    before, averages, _ = reference(kind, ITEMS)
    module, mine = Free(kind), SwitchScheduleFree()
    weights_only = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=3, save_weights_only=True)
    done = fit(module, ITEMS, mine, SaveAfter(4, tmp_path / "whole.ckpt"), weights_only, val_items=ITEMS[:2],
               val_check_interval=2, num_sanity_val_steps=1)  # fmt: skip
    trained = [w for where, mode, w in module.seen if where == "train" and mode]
    assert len(trained) == len(before)
    assert all(map(torch.equal, trained, before))
    validated = [w for where, mode, w in module.seen if where == "validate" and not mode]
    assert len(validated) == 8
    assert all(torch.equal(w, averages[2 * (i // 2) + 1]) for i, w in enumerate(validated))
    assert [mode for where, mode, _ in module.seen if where == "sanity"] == [False]
    for path, step in ((tmp_path / "whole.ckpt", 5), (tmp_path / "step=3.ckpt", 3), (tmp_path / "step=6.ckpt", 6)):
        saved = torch.load(path, weights_only=True)
        assert torch.equal(saved["state_dict"]["net.0.weight"], averages[step - 1]), path
        for state in saved.get("optimizer_states", []):
            assert [group["train_mode"] for group in state["param_groups"]] == [False]
    assert torch.equal(module.net[0].weight, averages[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done.test(module, loader(ITEMS), verbose=False)
        done.predict(module, loader(ITEMS))
    assert {mode for where, mode, _ in module.seen if where in ("test", "predict")} == {False}
    assert all(torch.equal(w, averages[-1]) for where, _, w in module.seen if where in ("test", "predict"))


@pytest.mark.parametrize("cut", range(0, 8, 2))
def test_a_resumed_run_equals_one_that_was_never_saved(cut: int, tmp_path: Path) -> None:
    """Bug: the trained weights are computed from the saved average, which gives them back up to rounding only."""
    whole = fit(Free(), ITEMS, SwitchScheduleFree(), ResumeExactly(), SkipNonFinite())
    path = tmp_path / "cut.ckpt"
    fit(Free(), ITEMS, SwitchScheduleFree(), ResumeExactly(), SkipNonFinite(), SaveAfter(cut, path))
    rest = fit(Free(), ITEMS, SwitchScheduleFree(), ResumeExactly(), SkipNonFinite(), ckpt_path=path, val_items=ITEMS)
    assert_same(everything(whole), everything(rest))


def test_a_verified_checkpoint_has_the_average_and_resumes_exactly(tmp_path: Path) -> None:
    """Bug: SaveCheckpoints, which does not call ``Trainer.save_checkpoint``, saves the trained weights."""
    _, averages, _ = reference("adamw", ITEMS)
    save = SaveCheckpoints(tmp_path, every=4, background=False)
    fit(Free(), ITEMS, SwitchScheduleFree(), save, ResumeExactly(), max_steps=4)
    store = store_of(tmp_path)
    assert store is not None
    saved = read(Store(store).entries()[-1].path).checkpoint
    assert torch.equal(saved["state_dict"]["net.0.weight"], averages[3])
    again = SaveCheckpoints(tmp_path, every=None)
    rest = fit(Free(), ITEMS, SwitchScheduleFree(), again, ResumeExactly(), ckpt_path=tmp_path)
    assert_same(everything(fit(Free(), ITEMS, SwitchScheduleFree(), ResumeExactly())), everything(rest))


def test_a_dropped_step_is_never_seen() -> None:
    """Bug: the optimizer's count or its average moves with a step that was dropped."""
    items = [*ITEMS[:3], *batches(NAN_LOSS), *ITEMS[3:]]
    plain = fit(Free(), ITEMS, SwitchScheduleFree(), SkipNonFinite())
    assert_same(everything(plain), everything(fit(Free(), items, SwitchScheduleFree(), SkipNonFinite())))


@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*no last checkpoint available")
def test_exceptions_leave_the_average_and_a_new_fit_trains(tmp_path: Path) -> None:
    """Bugs: an exception in training or validation leaves the wrong weights; the checkpoint of an exception."""
    before, averages, _ = reference("adamw", ITEMS)
    saver = OnExceptionCheckpoint(tmp_path, "exception")
    failing = Free()
    failing.raise_at = 5
    with pytest.raises(RuntimeError, match="own bug"):
        fit(failing, ITEMS, SwitchScheduleFree(), saver)
    assert torch.equal(failing.net[0].weight, averages[4])
    saved = torch.load(tmp_path / "exception.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["net.0.weight"], averages[4])
    assert torch.equal(saved["callbacks"]["switch_schedulefree"]["trained"]["net.0.weight"], before[5])

    module, callback = Free(raise_in_validation=True), SwitchScheduleFree()
    with pytest.raises(RuntimeError, match="own bug"):
        fit(module, ITEMS, callback, val_items=ITEMS[:1], val_check_interval=4)
    assert torch.equal(module.net[0].weight, averages[3])
    module.raise_in_validation, module.seen = False, []
    module.train()
    run(trainer(callback), module, ITEMS, ITEMS[:1])
    assert {(where, mode) for where, mode, _ in module.seen} == {("train", True), ("validate", False)}


def test_evaluation_by_others_within_the_fit_does_not_stop_training() -> None:
    """Bug: somebody's ``optimizer.eval()`` makes the next step raise."""

    class Evaluate(Callback):
        def on_train_batch_end(self, trainer: Any, module: LightningModule, *others: Any) -> None:
            trainer.optimizers[0].eval()

    assert fit(Free(), ITEMS, SwitchScheduleFree(), Evaluate()).global_step == 8


class Scheduled(Free):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": self.make(optimizer), "interval": "step"}]


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_schedules_and_running_statistics_are_refused() -> None:
    """Bugs: a decay on top of an average; statistics of weights that are not evaluated; a warm-up that is refused."""
    schedulers = torch.optim.lr_scheduler
    with pytest.raises(UserError, match=r"constant after its warm-up, got ScheduleLR\('cosine'\).*schedule=constant"):
        fit(Free(), ITEMS, SwitchScheduleFree(), ScheduleLR("cosine"))
    for make in (lambda o: schedulers.StepLR(o, 2), lambda o: schedulers.LinearLR(o, 1.0, 0.1)):
        with pytest.raises(UserError, match=r"got (StepLR|LinearLR).*warmup_steps"):
            fit(Scheduled(make), ITEMS, SwitchScheduleFree())
    fit(Scheduled(lambda o: schedulers.LinearLR(o, 0.1, 1.0, 2)), ITEMS, SwitchScheduleFree())
    fit(Scheduled(lambda o: schedulers.StepLR(o, 2)), ITEMS, SwitchScheduleFree(), ScheduleLR("constant"))
    with pytest.raises(UserError, match=r"running statistics of 1 modules \(net.1\).*LayerNorm"):
        fit(Free(norm=True), ITEMS, SwitchScheduleFree())
    frozen = Free(norm=True)
    frozen.net[1].eval()
    fit(frozen, ITEMS, SwitchScheduleFree())


def test_the_switching_optimizers_of_pytorch_optimizer() -> None:
    """Bug: only one package's classes are recognised."""
    po = pytest.importorskip("pytorch_optimizer")
    OPTIMIZERS["po"] = lambda p: po.ScheduleFreeAdamW(p, 0.05)
    try:
        module = Free("po")
        fit(module, ITEMS, SwitchScheduleFree(), val_items=ITEMS[:1])
    finally:
        del OPTIMIZERS["po"]
    assert {(where, mode) for where, mode, _ in module.seen if where != "sanity"} == {
        ("train", True), ("validate", False)
    }  # fmt: skip


def test_without_a_schedule_free_optimizer_nothing_changes() -> None:
    """Bug: a callback that is on beside AdamW and costs a bit, or refuses BatchNorm."""
    plain, with_it = (fit(Net(), ITEMS, *each) for each in ([], [SwitchScheduleFree()]))
    assert_same(everything(plain), everything(with_it))
    assert isinstance(with_it.lightning_module.net[1], nn.BatchNorm1d)  # type: ignore[index,union-attr]
