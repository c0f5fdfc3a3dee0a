"""The line of a result page that says when and on what it was measured."""

from __future__ import annotations

import os
import platform
from datetime import date

import lightning as L
import torch


def measured() -> str:
    """Return date, machine and versions, without a full stop."""
    return (
        f"Measured {date.today().isoformat()} on {os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, 1 thread, Lightning {L.__version__}"
    )
