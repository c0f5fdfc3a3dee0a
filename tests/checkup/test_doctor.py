"""What is found in modules with a planted bug, and that healthy ones are left alone: a part of benchmarks/doctor.py."""

from typing import Any

import pytest
import torch
from doctor_suite.modules import Mlp, Regression, digit_loaders, table_loaders
from doctor_suite.planted import BUGS, HEALTHY
from torch import nn
from torch.nn import functional as F

import stabletrain
from stabletrain.checkup.answer import Answer
from stabletrain.checkup.batches import SameBatches
from stabletrain.checkup.case import Case
from stabletrain.checkup.doctor import _asked
from stabletrain.checkup.reading import Batches
from stabletrain.checkup.table import CHECKS
from stabletrain.errors import UserError

QUICK = (
    "labels from 1 to 10",
    "softmax twice",
    "zero_grad missing",
    "head not in the optimizer",
    "rate /100",
    "target without its second dimension",
)
LEARNING = frozenset(check.name for check in CHECKS if check.family == "learning")
"""Checks that need further steps, which take most of the time."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(3)


@pytest.mark.parametrize("planted", [each for each in BUGS if each.name in QUICK], ids=lambda each: each.name)
def test_a_planted_bug_is_found(planted: Any) -> None:
    """Bug: a check that never has a finding."""
    skip = LEARNING - planted.found_by
    report = stabletrain.doctor(planted.module(), *planted.loaders(), skip=skip, seconds=600)
    assert {each.check.name for each in report.findings} & planted.found_by


@pytest.mark.parametrize("name", ["MLP, BatchNorm, SGD", "regression"])
def test_a_healthy_module_is_left_alone(name: str) -> None:
    """Bug: a check that always has a finding, which nobody would read again."""
    (healthy,) = (each for each in HEALTHY if each.name == name)
    report = stabletrain.doctor(healthy.module(), *healthy.loaders(), seconds=600)
    assert not report.findings, str(report)


def test_a_check_that_raises_is_a_finding() -> None:
    """Bug: an exception within a check is swallowed, and the check never runs without anybody noticing."""

    def broken(case: Case) -> Answer:
        raise TypeError("no such thing")

    check = CHECKS[0]._replace(ask=broken)
    answer = _asked(check, Case(None, Batches(), None), ())
    assert answer.kind == "finding"
    assert "TypeError: no such thing" in answer.text
    assert "broken" in answer.details


def test_the_report_is_sorted_and_complete() -> None:
    """Bugs: a finding below fine answers; JSON that lacks a check; a check that is left out and still asked."""
    report = stabletrain.doctor(Regression(squeezed=True), *table_loaders(), skip=LEARNING)
    kinds = [each.answer.kind for each in report.results]
    assert kinds == sorted(kinds, key=["finding", "not applicable", "fine"].index)
    assert {each.check.name for each in report.results} == {check.name for check in CHECKS}
    content = report.as_json()
    assert content["findings"] == len(report.findings) >= 1
    assert "broadcast" in str(report)
    assert "unsqueeze" in str(report)
    skipped = next(each for each in content["results"] if each["check"] == "one batch")
    assert skipped["answer"] == "not applicable"
    assert "left out" in skipped["text"]


def test_names_of_checks_are_unique_and_all_words_are_there() -> None:
    """Bug: a row of the table without advice or source."""
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(all(text.strip() for text in check[:6]) for check in CHECKS)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"module": nn.Linear(2, 2)}, "expected a LightningModule, got a Linear"),
        ({"skip": ["frosen"]}, "did you mean 'frozen'"),
        ({"seconds": 0}, "seconds must be > 0, got 0"),
        ({"train_loader": 3}, "train_loader: expected a DataLoader"),
        ({"train_loader": iter([])}, "train_loader is an iterator"),
    ],
)
def test_wrong_arguments_are_one_message(arguments: dict[str, Any], text: str) -> None:
    """Bug: a traceback from within, or a loader that has been moved."""
    given = {"module": Regression(), "train_loader": [torch.zeros(2, 8)], **arguments}
    with pytest.raises(UserError, match=text):
        stabletrain.doctor(**given)


def test_a_sum_that_is_divided_afterwards_is_fine() -> None:
    """Bug: reduction='sum' alone is a finding, also where the loss is a mean."""

    class Divided(Mlp):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            return F.cross_entropy(self.net(x), y, reduction="sum") / len(x)

    report = stabletrain.doctor(Divided(), *digit_loaders(), skip=LEARNING, seconds=600)
    assert not report.findings, str(report)


def test_steps_in_which_nothing_is_learned_end_with_the_time() -> None:
    """Bug: a large module is trained for hours."""
    report = stabletrain.doctor(Mlp(), *digit_loaders(), seconds=1e-6)
    answers = {each.check.name: each.answer for each in report.results}
    assert answers["raises"].kind == "fine"
    assert answers["raises"].text == "1 batches"
    assert answers["no better than guessing"].kind == "not applicable"
    assert "time" in answers["rate too high"].text


def test_served_batches_are_copies_and_cycle() -> None:
    """Bug: a step that changes its batch in place changes what later fits are trained on."""
    batches = [torch.zeros(2), torch.ones(2)]
    served = []
    for batch in SameBatches(batches, 3, float("inf")):
        served.append(batch.clone())
        batch.add_(5)
    assert torch.equal(torch.stack(served), torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))


def test_the_other_package_of_lightning_is_examined_too() -> None:
    """Bug: a module of pytorch_lightning is refused, or given a Trainer of the other package."""
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 1)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    report = stabletrain.doctor(Other(), *table_loaders(), skip=LEARNING)
    assert "raises" in {each.check.name for each in report.results if each.answer.kind == "fine"}, str(report)
