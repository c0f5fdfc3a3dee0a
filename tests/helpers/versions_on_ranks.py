"""Two ranks, each on a node of its own, one of which has other software."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from stabletrain.errors import UserError
from stabletrain.launch import versions


def compare(folder: Path, other: dict[str, str], same_versions: bool) -> str:
    """What the check at the first batch says on this rank; ``other``: versions of rank 1 that differ."""
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    mine = {**versions.own_versions(), **(other if rank else {})}
    trainer: Any = SimpleNamespace(
        num_nodes=2,
        world_size=2,
        is_global_zero=rank == 0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    said: list[str] = []
    with (
        mock.patch.object(versions, "own_versions", return_value=mine),
        mock.patch.object(socket, "gethostname", return_value="ab"[rank]),
        mock.patch.object(versions._logger, "warning", lambda *words: said.append(words[0] % words[1:])),
    ):
        try:
            versions.check_nodes(trainer, same_versions=same_versions)
        except UserError as error:
            said.append(f"refused: {error}")
    dist.destroy_process_group()
    return " ".join(said)
