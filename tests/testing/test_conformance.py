"""The checker itself: each deliberately broken plugin is refused, by the right check, in words that name the fault.

The plugins start as the template that `stabletrain new-plugin` writes, which passes, and get one fault each.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from stabletrain.config.discovery import PluginInfo, options_in
from stabletrain.errors import UserError
from stabletrain.testing import CheckFailed, check_plugin
from stabletrain.testing.conformance import CHECKS, check, checks_for, run_check
from stabletrain.testing.subject import Subject
from stabletrain.testing.template import create

MakeSubject = Callable[..., Subject]

EMPTY_CALLBACK = "Rule): ..."
HOOK = "def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):\n        super().on_train_batch_start("
HOOK += "trainer, pl_module, batch, batch_idx)\n"


class Fault(NamedTuple):
    """One fault: in ``file``, ``old`` becomes ``new``; ``check`` must find it and say ``words``."""

    file: str
    old: str
    new: str
    check: str
    words: str
    plugin: str = "clip"


def method(code: str) -> str:
    return f"Rule):\n    {code}\n"


FAULTS = {
    "no_option": Fault("yaml", "_target_", "target", "targets_are_public", "to have a _target_"),
    "unknown_target": Fault("yaml", ".Clip", ".Klip", "targets_are_public", "has no 'Klip"),
    "missing_argument": Fault("yaml", "decay: 0.98 ", "# decay: 0.98 ", "keys_are_parameters", "got no decay"),
    "unknown_argument": Fault("yaml", "name: null", "name: null\nodd: 1", "keys_are_parameters", "got odd"),
    "other_default": Fault("yaml", "decay: 0.98", "decay: 0.9", "defaults_agree", "decay: 0.9 in the file, 0.98"),
    "wrong_type": Fault("yaml", "warmup_steps: 50", "warmup_steps: many", "values_are_arguments", "warmup_steps"),
    "bad_value": Fault("yaml", "factor: 3.0", "factor: -3.0", "values_are_arguments", "factor must be > 1"),
    "heavy_package": Fault(
        "init", "from typing", "import lightning\nfrom typing", "import_is_light", "lightning matplotlib"
    ),
    "heavy_rule": Fault("rule", "from dataclasses", "import numpy\nfrom dataclasses", "import_is_light", "got numpy"),
    "impure_rule": Fault("rule", "decay = self", "import yaml; decay = self", "rule_is_pure", "'yaml' in"),
    "uncopyable": Fault(
        "callback", EMPTY_CALLBACK, method("__reduce_ex__ = None"), "copies_are_equal", "picklable and copyable"
    ),
    "list_in_state": Fault(
        "rule", "steps: int = 0", "steps: int = 0\n    seen: list = []", "state_is_plain", "got list"
    ),
    "untyped_state": Fault(
        "rule",
        "steps: int = 0",
        "steps: int = 0\n    pair: object = (1,)",
        "resumes_from_any_state",
        "survive a checkpoint",
    ),
    "hidden_counter": Fault(
        "rule",
        "if state.steps < self.warmup_steps",
        "self.__dict__['n'] = self.__dict__.get('n', 0) + 1\n        if self.__dict__['n'] < self.warmup_steps",
        "is_deterministic",
        "all history belongs in the state",
    ),
    "uses_nan": Fault("rule", ' and norm < float("inf")', "", "state_stays_finite", "finite state"),
    "blinded_by_nan": Fault(
        "rule",
        "            return Observation(state)\n",
        "            return Observation(state if outcome.applied is False or norm == norm else self.init())\n",
        "state_stays_finite",
        "a large spike after loss=",
    ),
    "divides_by_zero": Fault(
        "rule",
        " or state.mean == 0.0:\n            return NO_LIMITS",
        ":\n            return NO_LIMITS\n        1 / state.mean",
        "extremes_do_not_crash",
        "ZeroDivisionError",
    ),
    "no_number": Fault(
        "rule", 'reason = f"grad_norm', 'reason = "too large" or f"', "events_have_reasons", "number", "skip"
    ),
    "wrong_step": Fault("rule", "Event(outcome.step", "Event(outcome.step + 1", "events_have_reasons", "step=", "skip"),
    "wrong_label": Fault("rule", 'self.label, "skip"', "'me', \"skip\"", "events_have_reasons", "self.label", "skip"),
    "learns_skipped": Fault("rule", "outcome.applied and ", "", "skips_by_others_are_ignored", "outcome.applied"),
    "meddles": Fault(
        "callback",
        EMPTY_CALLBACK,
        method(HOOK + "        pl_module.net[0].bias.data.mul_(0.999)"),
        "untriggered_changes_no_weights",
        "bit-identical",
    ),
    "depends_on_position": Fault(
        "callback",
        EMPTY_CALLBACK,
        method(HOOK + "        if trainer.callbacks.index(self) == 2: pl_module.net[0].bias.data.mul_(0.999)"),
        "callback_order_does_not_matter",
        "different weights",
    ),
    "keeps_history": Fault(
        "callback",
        EMPTY_CALLBACK,
        method("def reset(self):\n        self.state = self.state or self.rule.init()"),
        "second_fit_equals_first",
        "start from scratch",
    ),
    "afraid_of_nan": Fault(
        "callback",
        EMPTY_CALLBACK,
        method("def on_before_backward(self, trainer, pl_module, loss):\n        assert loss == loss, 'NaN'"),
        "handles_nonfinite_losses",
        "AssertionError: NaN",
    ),
    "forgets_counter": Fault(
        "callback",
        EMPTY_CALLBACK,
        method(
            "def state_dict(self):\n        saved = super().state_dict()\n"
            "        return {**saved, 'state': {**saved['state'], 'steps': 0}}"
        ),
        "resumed_equals_uninterrupted",
        "resumed after batch",
    ),
    "odd_checkpoint": Fault(
        "callback",
        EMPTY_CALLBACK,
        method("def state_dict(self):\n        return {**super().state_dict(), 'odd': object}"),
        "resumed_equals_uninterrupted",
        "weights_only=True",
    ),
    "leaves_a_mark": Fault(
        "callback",
        EMPTY_CALLBACK,
        method(
            "def on_fit_start(self, trainer, pl_module):\n        super().on_fit_start(trainer, pl_module)\n"
            "        trainer.optimizers[0].mark = 1"
        ),
        "fit_leaves_no_changes",
        "mark",
    ),
    "knows_one_package": Fault(
        "callback",
        EMPTY_CALLBACK,
        method(
            "def on_gradients(self, step, parameters):\n        from lightning.pytorch import Trainer\n"
            "        if isinstance(self._guard.trainer, Trainer): parameters[0].data.mul_(0.999)"
        ),
        "both_packages_agree",
        "do the same under pytorch_lightning",
    ),
}


@pytest.fixture
def make_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeSubject:
    """Write a plugin from the template, with one text replaced, importable and trusted."""

    def make(name: str, fault: Fault | None = None) -> Subject:
        home = create(name, tmp_path)
        folder = home / name
        if fault is not None:
            file = next(folder.rglob("*.yaml")) if fault.file == "yaml" else folder / f"{fault.file}.py"
            if fault.file == "init":
                file = folder / "__init__.py"
            elif fault.file == "yaml":
                file = next(each for each in folder.rglob("*.yaml") if each.stem != "none")
            text = file.read_text()
            assert fault.old in text, "the template has changed: adapt this fault"
            file.write_text(text.replace(fault.old, fault.new))
        monkeypatch.syspath_prepend(str(home))
        monkeypatch.setenv("STABLETRAIN_TRUST", name)
        options = tuple(options_in(folder / "conf"))
        return Subject(
            PluginInfo(name=name, package=name, folder=folder, distribution=name, kind="rule", options=options)
        )

    return make


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name: str, make_subject: MakeSubject) -> None:
    # catches a check that passes everything
    fault = FAULTS[name]
    subject = make_subject(f"{fault.plugin}_{name}", fault)
    found = next(each for each, _ in CHECKS if each.__name__ == fault.check)
    with pytest.raises(CheckFailed) as failure:
        run_check(found, subject)
    message = str(failure.value)
    assert fault.words in message
    assert f"plugin '{fault.plugin}_{name}' fails the check '{fault.check}': expected" in message


def test_every_check_of_a_rule_has_a_fault_that_only_it_must_find() -> None:
    # catches a check that is added without showing that it can fail
    shown = {fault.check for fault in FAULTS.values()} | {"options_exist"}
    assert {each.__name__ for each in checks_for("rule")} == shown


def test_a_folder_without_options_is_named(tmp_path: Path) -> None:
    """Bug: a plugin that no config can select passes."""
    plugin = PluginInfo(name="p", package="p", folder=tmp_path, distribution="d", kind="rule", options=())
    with pytest.raises(CheckFailed, match=r"'options_exist': expected at least one file conf/<group>/<option>\.yaml"):
        check(plugin)


@pytest.mark.parametrize("name", ["clip_as_made", "skip_as_made"])
def test_the_template_passes_as_it_is(name: str, make_subject: MakeSubject) -> None:
    """Bug: the template makes a plugin that fails our own checks."""
    check(make_subject(name).plugin)


def test_an_unknown_plugin_is_the_callers_mistake() -> None:
    """Bug: a misspelt name is reported as a failed check."""
    with pytest.raises(UserError, match="did you mean 'clip_norm'"):
        check_plugin("clip_nrom")
