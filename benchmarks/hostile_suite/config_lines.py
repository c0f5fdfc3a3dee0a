"""Generated command lines: each is refused with a message about one of its keys, or trains two steps."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostile_suite.trial import HANG, Trial

KIND = "generated config lines"
STEPS = 2
_MOST_JOBS = 2
"""Of a sweep so many jobs are trained."""


def trials(folder: Path, seed: int, count: int) -> Iterator[Trial]:
    """Try ``count`` lines, each in a process that was forked after torch and Lightning had been imported.

    A line is composed and checked as `stabletrain train` does. If it is accepted, the run is built and trained until
    its second batch has ended; a run with several processes or on SLURM is only built.

    Args:
        folder: for the runs.
        seed: of the generator.
        count: how many lines.
    """
    from config_lines import config_lines  # of tests/helpers

    import stabletrain.launch.checks  # imported before the forks

    assert stabletrain.launch.checks
    folder.mkdir()
    for number, words in enumerate(config_lines(seed, count)):
        problem = _in_a_fork(words, folder / str(number))
        yield Trial(KIND, " ".join(words), problem)


def _in_a_fork(words: list[str], folder: Path) -> str:
    """Return what is wrong with the handling of a line; empty if nothing is."""
    folder.mkdir()
    with tempfile.TemporaryFile() as answer, (folder.with_suffix(".output")).open("wb") as output:
        began, pid = time.monotonic(), os.fork()
        if pid == 0:
            os.setsid()
            os.chdir(folder)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                pickle.dump(_judge(words), answer)
                answer.flush()
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() - began > HANG:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return f"hung for {HANG:.0f} s"
            time.sleep(0.01)
        answer.seek(0)
        try:
            problem: str = pickle.load(answer)
        except EOFError:
            tail = folder.with_suffix(".output").read_text(errors="replace")[-600:]
            return f"the process died: {' '.join(tail.split())}"
    return problem


def _judge(words: list[str]) -> str:
    from stabletrain.config.compose import compose, expand
    from stabletrain.config.problems import ConfigError
    from stabletrain.config.validate import check_keys
    from stabletrain.errors import UserError
    from stabletrain.launch.checks import check_config

    multirun = "-m" in words
    recipe, *overrides = [word for word in words if word != "-m"]
    try:
        problems, configs = [], []
        for name, job in expand(recipe, overrides, multirun=multirun):
            composed = compose(name, job)
            problems += check_keys(composed)
            configs.append(composed.config)
        if not problems:
            problems = [problem for config in configs for problem in check_config(config)]
        if problems:
            raise ConfigError(problems)
    except UserError as refused:
        return "" if _names_a_key(str(refused), overrides) else f"refused without naming a key: {refused}"
    except Exception as error:
        return f"{type(error).__name__} while checking: {' '.join(str(error).split())[:300]}"
    for config in configs[:_MOST_JOBS]:
        if config["launch"]["kind"] == "local" and config["launch"]["processes"] == 1:
            problem = _train(config)
            if problem:
                return f"accepted, then {problem}"
    return ""


def _names_a_key(message: str, overrides: list[str]) -> bool:
    keys = [word.lstrip("+~").partition("=")[0].partition("@")[0] or word for word in overrides]
    tops = {key.split(".")[0].split("/")[0] for key in keys} | {"recipe"}
    return any(top in message for top in tops if top)


class _Enough(BaseException):
    """The second batch has ended."""


def _train(config: dict[str, Any]) -> str:
    from lightning.pytorch import Callback

    from stabletrain.errors import UserError
    from stabletrain.launch.checks import check_and_build
    from stabletrain.runtime.signal_watch import SignalWatch
    from stabletrain.runtime.stop import TrainingStopped

    class StopEarly(Callback):
        batches = 0

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.batches += 1
            if self.batches >= STEPS:
                raise _Enough

    config = {**config, "logger": None, "run_dir": str(Path("run").absolute())}
    try:
        run, problems = check_and_build(config, SignalWatch())
        if run is None:
            return f"refused when it was built: {problems}"
        run.trainer.callbacks.insert(0, StopEarly())  # type: ignore[attr-defined]
        run.fit()
    except _Enough:
        return ""
    except TrainingStopped:
        return ""
    except UserError as error:  # about the data, which are read only now
        return "" if ": " in str(error) else f"a message without a key: {error}"
    except BaseException as error:
        traceback.print_exc(file=sys.stdout)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""
