"""Determine how a run ended, also if its worker died without writing a result.

``python -m stabletrain.launch.final_status run.yaml CODE`` is what a batch script runs after its worker has ended.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from stabletrain.config.resume import checkpoint_of_run
from stabletrain.launch.mlflow_run import finish_run
from stabletrain.launch.process import ProcessEnd
from stabletrain.launch.result import End, Result, read_result


def final_result(config: Mapping[str, Any], ended: ProcessEnd) -> Result:
    """Return how a run ended, from its result.json; if the worker wrote none, write one from the exit code.

    Args:
        config: the resolved config.
        ended: how the worker's process ended.
    """
    folder = Path(config["run_dir"])
    result = read_result(folder)
    if result is None:
        end: End = "killed" if _ended_by_signal(ended) else "failed"
        checkpoint = checkpoint_of_run(folder)
        result = Result(end=end, message=_describe(ended), checkpoint=str(checkpoint) if checkpoint else None)
        result.write(folder)
    return result


def _ended_by_signal(ended: ProcessEnd) -> bool:
    return ended.code < 0 or ended.code > 128 or ended.signum is not None


def _describe(ended: ProcessEnd) -> str:
    signum = -ended.code if ended.code < 0 else ended.code - 128 if ended.code > 128 else None
    if signum == 9:
        return "the worker was killed by signal 9 (SIGKILL), for example because it ran out of memory"
    if signum is not None:
        return f"the worker was ended by signal {signum} before it wrote a result"
    return f"the worker ended with exit code {ended.code} before it wrote a result; see its output above"


def main(argv: Sequence[str]) -> int:
    """Set the final status of a run and return its exit code.

    Args:
        argv: path of run.yaml, and the worker's exit code as a shell sees it.
    """
    config = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8"))
    result = final_result(config, ProcessEnd(code=int(argv[1])))
    problem = finish_run(config, result)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
