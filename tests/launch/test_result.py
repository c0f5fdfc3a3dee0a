"""result.json is JSON for every reader."""

import json
import math
from pathlib import Path
from typing import Any

from stabletrain.launch.result import Result, read_result


def refuse(text: str) -> Any:
    raise AssertionError(f"not JSON: {text}")


def test_metrics_that_are_not_finite(tmp_path: Path) -> None:
    """Bugs: a bare NaN, which other readers refuse; an earlier version's file with one is not read any more."""
    metrics = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}
    Result(end="failed", metrics=metrics).write(tmp_path)
    file = tmp_path / "result.json"
    json.loads(file.read_text(), parse_constant=refuse)
    for text in (file.read_text(), json.dumps({"end": "failed", "metrics": metrics})):
        file.write_text(text)
        found = read_result(tmp_path)
        assert found is not None
        assert math.isnan(found.metrics.pop("a"))
        assert found.metrics == {"b": math.inf, "c": -math.inf, "d": 1.5}
