"""What a script's user reads: one line for a bad step, arguments instead of config keys, one line at the end."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fits import HEALTHY, HIGH_LOSS, NAN_LOSS, Net, batches, fit

import stabletrain
from stabletrain import ClipNorm, DetectSpikes, Guard, SkipNonFinite, TrainingStopped, UserError, default_callbacks
from stabletrain.core.events import Event
from stabletrain.core.outcome import Outcome
from stabletrain.runtime.records.event_log import END, EventLog
from stabletrain.terminal import LastResort

ONE_NAN = batches(*[HEALTHY] * 3, NAN_LOSS, *[HEALTHY] * 3)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls a function; returns stabletrain's lines on the standard error of a script without logging of its own."""

    def lines_of(action: Callable[[], object], *handlers: logging.Handler) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr(logging.root, "handlers", list(handlers))  # instead of pytest's
            ours = logging.getLogger("stabletrain")
            patch.setattr(ours, "handlers", [each for each in ours.handlers if isinstance(each, LastResort)])
            action()
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("stabletrain: ")]

    return lines_of


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_a_bad_step_is_one_line_and_the_end_another(terminal: Any, tmp_path: Path, mode: Any) -> None:
    """Bugs: three plugins each write a line for one NaN; the file lacks what the line leaves out; no last line."""
    file = tmp_path / "events.jsonl"
    plugins = [*default_callbacks(), Guard(mode=mode, events=file)]
    step, end = terminal(lambda: fit(Net("adamw-fused"), ONE_NAN, *plugins))
    assert step.startswith("stabletrain: step 3: non-finite: loss nan, grad_norm nan: step skipped (1 in a row)")
    assert ("gradient non-finite in 6 of 6 parameters" in step) == (mode == "exact")
    writers = [json.loads(line)["plugin"] for line in file.read_text().splitlines()]
    assert writers == ["skip_nonfinite", "rollback", *(["monitor_gradients"] if mode == "exact" else [])]
    assert end.startswith("stabletrain: 7 steps: 6 applied, 1 skipped, ")
    assert end.endswith(f" clipped; 0 rollbacks; events: {file}")


def test_a_rollback_is_one_line_and_is_counted(terminal: Any, tmp_path: Path) -> None:
    """Bugs: the request, the second warm-up and the rollback in a line each; an end that knows of no rollback."""
    items = batches(*[HEALTHY] * 12, *[NAN_LOSS] * 2, *[HEALTHY] * 2)
    stack = [SkipNonFinite(max_in_a_row=2), stabletrain.Rollback(every=4, trust_after=1)]
    lines = terminal(lambda: fit(Net(), items, *stack, default_root_dir=tmp_path))
    (rollback,) = [line for line in lines if "rollback: back to" in line]
    assert rollback.startswith("stabletrain: step 13: rollback: ")
    assert "2 non-finite steps in a row (SkipNonFinite(max_in_a_row=2))" in rollback
    assert "; second warm-up: learning rate climbs over 100 steps" in rollback
    assert rollback.count("loss nan") == 1
    assert sum("step 13:" in line for line in lines) == 1
    assert "; 1 rollback; " in lines[-1]


def test_a_spike_that_led_to_nothing_is_called_a_spike(terminal: Any) -> None:
    """Bug: `rollback: loss 3.1 > 2.9` in a run without a rollback."""

    def spikes() -> None:
        log, outcome = EventLog(None), Outcome(350, 3.1, 8.0, 8.0, 1.0)
        log.append(Event(350, "rollback", "spike", 3.1, 2.9, "loss 3.1 > 2.9"))
        log.conclude(outcome)
        log.append(Event(351, "rollback", "spike", 3.0, 2.9, "loss 3 > 2.9"))
        log.conclude(outcome._replace(step=351, skipped=True))
        log.show()
        log.show()

    assert terminal(spikes) == [
        "stabletrain: step 350: spike: loss 3.1 > 2.9; the step was applied, clipped to 1",
        "stabletrain: step 351: spike: loss 3 > 2.9; the step was skipped (number 2 of its kind)",
    ]


def test_who_configures_logging_gets_no_second_line(terminal: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: every message twice once a script calls `basicConfig`; a last line for who has asked for errors only."""

    def train() -> None:
        fit(Net(), ONE_NAN, SkipNonFinite())

    assert len(terminal(train)) == 2
    assert terminal(train, logging.StreamHandler()) == []
    with caplog.at_level(logging.ERROR, "stabletrain"):
        assert terminal(train) == []


def test_the_command_line_has_a_summary_of_its_own(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: two summaries at the end of a recipe's run."""
    monkeypatch.setattr(END, "disabled", True)
    assert terminal(lambda: fit(Net(), ONE_NAN[:2], SkipNonFinite())) == []


@pytest.mark.parametrize("by_config", [False, True])
def test_a_script_hears_of_arguments_and_a_config_of_keys(by_config: bool, tmp_path: Path) -> None:
    """Bug: `config key plugins.nonfinite.max_in_a_row` to somebody who has never seen a config, or the other way."""
    if by_config:
        node = {"nonfinite": {"_target_": "stabletrain.SkipNonFinite", "max_in_a_row": 2}}
        plugins = stabletrain.callbacks(node)
        wrong = {"clip": {"_target_": "stabletrain.ClipNorm", "max_norm": -1}}
        with pytest.raises(UserError, match=r"got -1 \(config key plugins\.clip\.max_norm\)"):
            stabletrain.callbacks(wrong)
    else:
        plugins = [SkipNonFinite(max_in_a_row=2)]
        with pytest.raises(UserError, match=r"got -1 \(ClipNorm\(max_norm=\.\.\.\)\)"):
            ClipNorm(max_norm=-1)
    named = "plugins.nonfinite.max_in_a_row=2" if by_config else "SkipNonFinite(max_in_a_row=2)"
    with pytest.raises(TrainingStopped) as stopped:
        fit(Net(), batches(*[NAN_LOSS] * 3), *plugins, Guard(events=tmp_path / "events.jsonl"))
    assert f"2 non-finite steps in a row ({named}); last" in str(stopped.value)
    assert named in (tmp_path / "events.jsonl").read_text()
    with pytest.raises(UserError) as refused:  # found in a fit, in a message that names the key itself
        fit(Net(), ONE_NAN, *plugins, DetectSpikes(expect=[100]))
    assert str(refused.value).startswith("DetectSpikes(expect=...): ")


def test_a_setting_of_another_plugin_is_named_as_it_was_built(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: where some plugins come from a config and others from code, all are named in one way."""
    (clip,) = stabletrain.callbacks({"clip": {"_target_": "stabletrain.ClipNorm"}})
    fit(Net(), ONE_NAN[:1], clip, SkipNonFinite())
    with caplog.at_level(logging.WARNING, "stabletrain"):
        logging.getLogger("stabletrain").warning("%s or %s", "plugins.clip.max_norm=2", "plugins.nonfinite.min_scale")
    assert caplog.messages[-1] == "plugins.clip.max_norm=2 or SkipNonFinite(min_scale=...)"


def test_a_stop_is_no_page_of_traceback(terminal: Any) -> None:
    """Bugs: forty lines of Lightning for a decision; an exception that cannot be caught; no line at the end."""

    def train() -> None:
        with pytest.raises(TrainingStopped) as stopped:
            fit(Net(), batches(HIGH_LOSS, *[NAN_LOSS] * 3), SkipNonFinite(max_in_a_row=2))
        frames = traceback.extract_tb(stopped.value.__traceback__)
        assert [Path(frame.filename).name for frame in frames][:3] == ["test_messages.py", "fits.py", "fits.py"]
        assert len(frames) <= 5
        assert len("".join(traceback.format_exception(stopped.value)).splitlines()) < 15

    lines = terminal(train)
    assert lines[-1].startswith("stabletrain: 3 steps: 1 applied, 2 skipped, 0 clipped; 0 rollbacks; events: ")
