import logging
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from stabletrain import SaveCheckpoints
from stabletrain.testing.trainer import quiet_trainer
from stabletrain.workloads import DigitsCNN, DigitsData
from stabletrain.workloads.digits_cnn import shift_randomly

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")


def test_split_is_stratified_and_disjoint() -> None:
    """Catches a digit in both parts, and a class that validation hardly sees."""
    train, validation = DigitsData()._examples()
    assert (len(train), len(validation)) == (1437, 360)
    seen = {image.numpy().tobytes() for image in train.inputs}
    assert not any(image.numpy().tobytes() in seen for image in validation.inputs)
    whole = torch.cat([train.labels, validation.labels]).bincount(minlength=10)
    for part in (train, validation):
        expected = whole * len(part) / 1797
        assert (part.labels.bincount(minlength=10) - expected).abs().max() <= 1
    assert train.inputs.min() == 0.0
    assert train.inputs.max() == 1.0


def test_split_is_the_same_each_time() -> None:
    """Catches a split drawn from a global generator: runs would not be comparable."""
    first, again = DigitsData()._examples(), DigitsData(batch_size=7)._examples()
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.labels, b.labels)


def test_a_batch_is_the_naive_gather_of_its_items() -> None:
    """Catches images and labels that are gathered in different orders."""
    _, validation = DigitsData()._examples()
    images, labels = validation.__getitems__([3, 0, 359])
    for row, index in enumerate([3, 0, 359]):
        image, label = validation[index]
        assert torch.equal(images[row], image)
        assert torch.equal(labels[row], label)
    batches = list(DigitsData(batch_size=100).val_dataloader())
    assert torch.equal(torch.cat([b[1] for b in batches]), validation.labels)


def test_shifts_are_the_naive_ones() -> None:
    """Catches swapped axes, wrap-around, and a shift shared by the whole batch."""
    images = torch.rand(64, 2, 8, 8)
    torch.manual_seed(0)
    moved = shift_randomly(images, 2)
    torch.manual_seed(0)
    down, right = torch.randint(5, (2, 64))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for i in range(64):
        expected = padded[i, :, down[i] : down[i] + 8, right[i] : right[i] + 8]
        assert torch.equal(moved[i], expected)
    assert len({(int(d), int(r)) for d, r in zip(down, right, strict=True)}) > 12
    assert shift_randomly(images, 0) is images


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: DigitsData(batch_size=0), r"data\.batch_size"),
        (lambda: DigitsData(batch_size=1438), r"data\.batch_size"),
        (lambda: DigitsData(workers=-1), r"data\.workers"),
        (lambda: DigitsCNN(width=0), r"model\.width"),
        (lambda: DigitsCNN(dropout=1.0), r"model\.dropout"),
        (lambda: DigitsCNN(max_shift=4), r"model\.max_shift"),
    ],
)
def test_a_bad_argument_is_named(make: type, key: str) -> None:
    """Catches an error far away from its cause."""
    with pytest.raises(ValueError, match=key):
        make()


def test_only_weights_decay_and_momentum_is_nesterovs() -> None:
    """Catches decay on batch norm, which lets a network forget its scale."""
    optimizer = DigitsCNN(weight_decay=0.1).configure_optimizers()
    decays = {(p.ndim >= 2, g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert decays == {(True, 0.1), (False, 0.0)}
    assert all(g["nesterov"] and g["momentum"] == 0.9 for g in optimizer.param_groups)


def test_reaches_97_percent_with_a_step_schedule(tmp_path: Path) -> None:
    """Catches a network, an augmentation or defaults that no longer learn."""

    class Scheduled(DigitsCNN):
        def configure_optimizers(self) -> object:  # type: ignore[override]
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=6, gamma=0.2)]

    L.seed_everything(0, verbose=False)
    fit = quiet_trainer(max_epochs=15, default_root_dir=tmp_path)
    fit.fit(Scheduled(), datamodule=DigitsData())
    assert fit.callback_metrics["val/accuracy"] > 0.97
    assert {"val/loss", "train/loss"} <= set(fit.callback_metrics)


def test_a_config_that_monitors_an_old_name_still_works(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a recipe of a user that dies at its first validation, since `val_loss` became `val/loss`."""
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    saver = SaveCheckpoints(tmp_path / "own", every=None, monitor="val_accuracy", mode="max", background=False)
    with caplog.at_level(logging.WARNING, "stabletrain"):
        fit = quiet_trainer(best, saver, max_epochs=1, limit_train_batches=2, default_root_dir=tmp_path)
        fit.fit(DigitsCNN(), datamodule=DigitsData())
    assert best.best_model_score == fit.callback_metrics["val/loss"]
    assert saver.best_model_path
    assert "val_loss" not in fit.callback_metrics
    assert sorted(record.getMessage() for record in caplog.records) == [
        "ModelCheckpoint monitors 'val_loss', which is now called 'val/loss': use that",
        "SaveCheckpoints monitors 'val_accuracy', which is now called 'val/accuracy': use that",
    ]
