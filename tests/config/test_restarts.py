"""``launch.restarts``: refused where a restart would begin anew, off by default there, 3 elsewhere."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from stabletrain.config.compose import compose
from stabletrain.config.restarts import allowed_restarts
from stabletrain.config.validate import check_content

TINY = str(Path(__file__).parents[1] / "launch" / "tiny.yaml")
ELSEWHERE = {"plugins.checkpoints.folder": "/elsewhere"}


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    """With torchrun and checkpoints."""
    return compose(TINY, ["launch=torchrun", "plugins/checkpoints=save"]).config


def changed(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    config = deepcopy(config)
    for key, value in values.items():
        node: Any = config
        *path, last = key.split(".")
        for each in path:
            node = node[each]
        node[last] = value
    return config


NONE = {"plugins.checkpoints": None}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"launch.restarts": 2, **NONE}, "a restart would begin anew"),
        ({"launch.restarts": 2, **ELSEWHERE}, "plugins.checkpoints.folder=null"),
        ({"launch.requeue": True, **NONE}, "a restart would begin anew"),
        ({"launch.restarts": -1}, "at least 0, or null"),
        ({"launch.restarts": "two"}, "expected int or None"),
        ({"launch.progress_steps": 0}, "at least 1"),
        ({"launch.timeout": "5 parsecs"}, "such as '30s', '5min'"),
        ({"launch.timeout": "0s"}, "above 0"),
        ({"launch.timeout": "90d"}, "expected 1 to"),
    ],
)
def test_bad_values_are_one_message(composed: dict[str, Any], values: dict[str, Any], problem: str) -> None:
    """Bug: a run starts over from step 0 after a death, though its user has asked for restarts."""
    (found,) = check_content(changed(composed, values))
    assert found.key in values
    assert problem in found.text


@pytest.mark.parametrize(
    ("values", "restarts", "why"),
    [
        ({"launch.restarts": 0, **NONE}, 0, ""),
        (NONE, 0, "plugins/checkpoints=save"),
        (ELSEWHERE, 0, "plugins.checkpoints.folder=null"),
        ({"launch.requeue": True, **ELSEWHERE}, 0, "plugins.checkpoints.folder=null"),
        ({}, 3, ""),
        ({"launch.restarts": 0}, 0, ""),
        ({"launch.restarts": 5, "launch.timeout": "5min"}, 5, ""),
    ],
)
def test_the_default_holds_where_a_run_can_go_on(
    composed: dict[str, Any], values: dict[str, Any], restarts: int, why: str
) -> None:
    """Bugs: launch=torchrun without checkpoints is an error, or silently has no restarts."""
    config = changed(composed, values)
    assert not check_content(config)
    allowed, missing = allowed_restarts(config)
    assert allowed == restarts
    assert why in missing
    assert bool(why) == bool(missing)
