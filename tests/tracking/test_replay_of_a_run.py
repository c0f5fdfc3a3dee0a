import math

import pytest

from stabletrain.cli.recorded import read
from stabletrain.cli.replay import replay_file
from stabletrain.errors import UserError
from stabletrain.tracking import MLflowLogger


@pytest.mark.parametrize("prefix", ["", "stability/"])
def test_replay_of_a_run(uri, prefix, monkeypatch):
    """Bug: the id of a run is taken for a file; or a message without the store."""
    monkeypatch.setattr("stabletrain.tracking.record.packages", lambda: {"stabletrain": "1"})
    logger = MLflowLogger()
    for step, (loss, norm) in enumerate([(2.0, 0.5), (math.nan, 1.0), (1.5, 8.0)]):
        logger.log_metrics({f"{prefix}loss": loss, f"{prefix}grad_norm": norm}, step)
    logger.finalize("success")
    text = replay_file("clip_norm", logger.version, ["max_norm=1"])
    assert text.endswith("clip_norm: 3 steps, 1 clipped (33.33%), 0 skipped (0.00%); no events")
    with pytest.raises(UserError, match=r"there is no file and no run 0{32} in sqlite:///.*mlflow\.db"):
        read("0" * 32)
