"""Python processes that tests start: their environment, and the command line."""

import os
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent
LAUNCH = HELPERS.parent / "launch"
"""With the module ``tiny_workload``."""


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """This process's environment, with one thread a process and with folders before its ``PYTHONPATH``.

    Args:
        folders: to import from.
        variables: further variables.
    """
    path = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path)), **variables}


class Cli:
    """Runs ``stabletrain`` in a process of its own, in a folder; ``tiny_workload`` can be imported there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, *words: str, **variables: str) -> "subprocess.Popen[str]":
        """Start the process, and return at once."""
        inherited = environment(LAUNCH, COLUMNS="120")
        inherited.pop("MLFLOW_TRACKING_URI", None)
        return subprocess.Popen(
            [sys.executable, "-m", "stabletrain", *words],
            cwd=self.folder,
            env={**inherited, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Start the process, and wait until it ends; after 300 s it is killed."""
        with self.start(*words, **variables) as process:
            try:
                out, errors = process.communicate(timeout=300)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(words, process.returncode, out, errors)
