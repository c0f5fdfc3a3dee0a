"""What a strategy chose, as a file in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from stabletrain.runtime.records.run_files import RUN_YAML, STRATEGY
from stabletrain.strategies.sharding import Sharded


def write(trainer: Trainer, strategy: Any, sharded: Sharded) -> None:
    """Write strategy.json, if the run has a folder with a run.yaml; a script's Trainer has none.

    Args:
        trainer: of the run.
        strategy: that sharded the module.
        sharded: what it did.
    """
    folder = Path(trainer.default_root_dir)
    if not (folder / RUN_YAML).is_file():
        return
    content = {
        "strategy": "fsdp2",
        "units": list(sharded.choice.units),
        "chosen_by": sharded.choice.reason,
        "share_of_parameters": round(sharded.choice.share, 6),
        "whole_parameters": len(sharded.whole),
        "window_bytes": sharded.window_bytes if strategy.defer else 0,
        "processes": trainer.world_size,
        "replicate": strategy.replicate,
    }
    (folder / STRATEGY).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
