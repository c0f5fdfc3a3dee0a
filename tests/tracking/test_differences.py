"""In which parameters runs differ, without what follows from the chosen options; groups of seeds."""

import math

import pytest

from stabletrain.tracking import RunSummary, side_by_side
from stabletrain.tracking.differences import differences, parameters
from stabletrain.tracking.seeds import by_seed

NONE = {"choices.plugins/clip": "none", "plugins.clip": "None", "seed": "0", "typed": "['seed']"}
ZSCORE = {
    "choices.plugins/clip": "zscore",
    "plugins.clip._target_": "stabletrain.ClipZScore",
    "plugins.clip.z_threshold": "3.0",
    "plugins.clip.warmup_steps": "50",
    "seed": "0",
    "typed": "[]",
}


def test_an_option_and_not_what_follows_from_it():
    """Bugs: sixteen arguments of a plugin hide the one word that differs; the option comes after them; what was typed
    counts as a parameter."""
    assert differences([NONE, ZSCORE]) == {"clip": ("none", "zscore")}
    assert differences([ZSCORE, ZSCORE]) == {}
    assert list(differences([NONE | {"a": "1"}, ZSCORE | {"seed": "1", "a": "2"}])) == ["clip", "seed", "a"]


def test_what_does_not_follow_is_shown():
    """Bugs: a threshold that was changed is hidden because another run has no such plugin; the rate of another
    optimizer is taken for plumbing; an argument that was typed is hidden."""
    other = ZSCORE | {"plugins.clip.z_threshold": "4.0"}
    assert differences([NONE, ZSCORE, other]) == {
        "clip": ("none", "zscore", "zscore"),
        "plugins.clip.z_threshold": (None, "3.0", "4.0"),
    }
    typed = other | {"typed": "['plugins.clip.z_threshold']"}
    assert differences([NONE, typed]) == {"clip": ("none", "zscore"), "plugins.clip.z_threshold": (None, "4.0")}
    adam = {"choices.optimizer": "adamw", "optimizer._target_": "torch.optim.AdamW", "optimizer.lr": "0.1"}
    lion = {"choices.optimizer": "lion", "optimizer._target_": "Lion", "optimizer.lr": "0.01", "optimizer.x": "1"}
    assert differences([adam, lion]) == {"optimizer": ("adamw", "lion"), "optimizer.lr": ("0.1", "0.01")}


def test_runs_without_recorded_choices():
    """Bugs: a run of another tool, or of a script, is compared with one of a recipe; two classes of one option look
    equal; text that is no list is an error."""
    script = {"plugins.clip._target_": "stabletrain.ClipNorm", "plugins.clip.max_norm": "1.0", "typed": "[[[nonsense"}
    assert differences([script, {"plugins.clip": "None"}]) == {"plugins.clip": ("ClipNorm", "None")}
    assert differences([script, {}])["plugins.clip"] == ("ClipNorm", None)
    assert differences([ZSCORE, {"lr": "0.1"}])["clip"] == ("zscore", None)
    same = [ZSCORE, ZSCORE | {"plugins.clip._target_": "mine.Clip"}]
    assert differences(same) == {"plugins.clip": ("ClipZScore", "Clip")}
    assert differences([{"clip": "zscore", **ZSCORE}, {"clip": "none", **NONE}]) == {"clip": ("zscore", "none")}


def test_a_parameter_that_a_resume_has_changed():
    """Bug: a run that was resumed with another rate looks like one that had the first rate throughout."""
    params = parameters({"optimizer.lr": "0.1"}, {"changed.optimizer.lr": "0.01", "changed.typed": "[]", "x": "1"})
    assert params == {"optimizer.lr": "0.1, then 0.01"}


def summary(name: str, seed: str, rate: str, loss: float, outcome: str = "healthy") -> RunSummary:
    params = {"seed": seed, "data.seed": seed, "optimizer.lr": rate}
    return RunSummary(
        run_id=name, name=name, status="FINISHED", params=params, measures={"final_loss": loss}, outcome=outcome
    )


def test_runs_that_differ_in_the_seed_alone():
    """Bugs: a seed that the data has too makes each run a variant; a NaN spoils the mean, or hides; the deviation of
    one run is an error; the outcome of one of the runs is lost."""
    runs = [
        summary("a", "0", "0.1", 1.0),
        summary("b", "1", "0.1", 2.0),
        summary("c", "2", "0.1", math.nan, "diverged"),
        summary("d", "0", "0.2", 3.0),
    ]
    first, second = by_seed(runs, side_by_side(runs).params)
    assert (first.label, first.members, first.seeds) == ("optimizer.lr=0.1", (0, 1, 2), ("0", "1", "2"))
    assert first.text("final_loss") == "1.5 ± 0.7071 (2 of 3)"
    assert first.ends == "healthy × 2, diverged"
    assert (second.members, second.text("final_loss"), second.text("spikes")) == ((3,), "3", "-")
    alone = by_seed(runs[2:3], side_by_side(runs[2:3]).params)
    assert (alone[0].label, alone[0].text("final_loss")) == ("", "nan (0 of 1)")


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_no_finite_value(loss):
    """Bug: a variant of which all runs diverged is an error."""
    runs = [summary("a", "0", "0.1", loss), summary("b", "1", "0.1", loss)]
    assert by_seed(runs, side_by_side(runs).params)[0].text("final_loss") == "nan (0 of 2)"
