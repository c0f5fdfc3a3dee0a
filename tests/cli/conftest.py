from pathlib import Path

import processes
import pytest


@pytest.fixture
def cli(tmp_path: Path) -> processes.Cli:
    """The command line in a temporary folder."""
    return processes.Cli(tmp_path)
