"""stability.png: nothing extreme is lost, and a run of any kind has one."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

from stabletrain.runtime.records.steps_file import Flag, StepsFile
from stabletrain.tracking import picture

pytest.importorskip("matplotlib")


def record(folder: Path, *steps: tuple[float, float, int]) -> None:
    file = StepsFile(folder / "steps.bin")
    file.cut(0)
    for i, (loss, norm, flags) in enumerate(steps):
        file.append(i, loss, norm, Flag.RECORDED | flags)
    file.close()


def test_any_run_has_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: a run without finite numbers, without norms, of one step, or with a zero norm raises; a title with a dollar
    or damaged events ends it; without matplotlib, or without steps, an error."""
    assert picture.draw(tmp_path) is None
    nan, healthy = math.nan, (2.0, 1.0, 0)
    runs = [
        [healthy],
        [(nan, nan, Flag.SKIPPED | Flag.NO_LOSS)],
        [(2.0, nan, 0), (-3.0, nan, 0)],
        [(1.0, 0.0, 0), (math.inf, nan, Flag.SKIPPED), (1e300, 1e-300, Flag.CLIPPED), (nan, math.inf, Flag.OVERFLOW)],
    ]
    lines = ['{"kind": "rollback", "step": 1}', "{", '{"kind": [], "step": "x"}', '{"kind": "spike", "step": 0}']
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    for steps in runs:
        record(tmp_path, *steps)
        file = picture.draw(tmp_path, "a $x_ title")
        assert file == tmp_path / "stability.png"
        assert file.read_bytes().startswith(b"\x89PNG")
        file.unlink()
    assert picture.events_by_kind(tmp_path, ["spike", "rollback"]) == {"spike": [0], "rollback": [1]}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert picture.draw(tmp_path) is None
    assert not (tmp_path / "stability.png").exists()


def test_marks_are_at_their_steps(tmp_path: Path) -> None:
    """Bugs: a mark at another step; a step that was clipped is drawn as skipped; a NaN has no mark; a spike's mark
    only where the step was also dropped."""
    record(tmp_path, *[(2.0, 1.0, 0)] * 4, (3.0, 9.0, Flag.CLIPPED), (math.nan, 1.0, Flag.SKIPPED), (2.0, 1.0, 0))
    (tmp_path / "events.jsonl").write_text(json.dumps({"kind": "spike", "step": 2}))
    events = picture.events_by_kind(tmp_path, ["spike", "divergence", "rollback"])
    figure = picture._figure(picture.read_steps(tmp_path / "steps.bin"), events, "")
    found = [
        {each.get_label(): each.get_offsets().tolist() for each in panel.collections} for panel in figure.get_axes()
    ]
    assert found[0] == {"spike or divergence": [[2, 2.0]], "skipped": [[5, 0.97]]}
    assert found[1] == {"clipped": [[4, 9.0]], "spike or divergence": [[2, 1.0]], "skipped": [[5, 1.0]]}


def test_thinning_loses_no_extreme() -> None:
    """Bug: one high step among a hundred thousand is not in the picture."""
    ys = np.random.default_rng(0).standard_normal(100_000)
    ys[[5, 77_777, 99_999]] = 50.0, -60.0, 70.0
    xs, kept = picture._thinned(np.arange(100_000), ys)
    assert len(xs) <= 2 * 1000
    assert (np.diff(xs) > 0).all()
    assert {5: 50.0, 77_777: -60.0, 99_999: 70.0}.items() <= dict(zip(xs.tolist(), kept.tolist(), strict=True)).items()
