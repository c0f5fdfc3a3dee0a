"""``python -m stabletrain.launch.settle run.yaml CODE``: what a batch script does after its worker has ended."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stabletrain.config.validate import checkpoint_of
from stabletrain.launch.mlflow_run import settle_run
from stabletrain.launch.process import Ended
from stabletrain.launch.result import End, Result, read_result


def conclude(config: Mapping[str, Any], ended: Ended) -> Result:
    """Return how a run ended: in its worker's words, or, if it could not say, from its exit code.

    Args:
        config: a resolved run.
        ended: how the process ended.
    """
    folder = Path(config["run_dir"])
    result = read_result(folder)
    if result is None:
        end: End = "killed" if _by_signal(ended) else "failed"
        checkpoint = checkpoint_of(str(folder))  # looked for by name: this process does not import torch
        found = str(checkpoint) if checkpoint and checkpoint != folder else None
        result = Result(end=end, message=_last_words(ended), checkpoint=found)
        result.write(folder)
    return result


def _by_signal(ended: Ended) -> bool:
    return ended.code < 0 or ended.code > 128 or ended.signum is not None


def _last_words(ended: Ended) -> str:
    signum = -ended.code if ended.code < 0 else ended.code - 128 if ended.code > 128 else None
    if signum == 9:
        return "the worker was killed by signal 9 (SIGKILL): out of memory, or somebody ended it"
    if signum is not None:
        return f"the worker was ended by signal {signum} before it could say why"
    return f"the worker ended with exit code {ended.code} before it could say why; its output is above"


def main(argv: Sequence[str]) -> int:
    """Settle a run and return its exit code.

    Args:
        argv: path of run.yaml, and the worker's exit code as a shell sees it.
    """
    config = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
    result = conclude(config, Ended(code=int(argv[1])))
    complaint = settle_run(config, result)
    if complaint:
        print(f"error: {complaint}", file=sys.stderr)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
