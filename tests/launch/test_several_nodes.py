"""A run on two nodes, which are two commands on this machine: one of them is killed with all it has started."""

import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import LAUNCH, Cli
from undisturbed import tiny_weights

from stabletrain.launch.node_link import free_port
from stabletrain.launch.process_tree import kill_tree
from stabletrain.runtime.checkpoints.loading import load
from stabletrain.runtime.records.steps_file import RECORD_BYTES

_LIMIT = 900.0
"""Seconds for the whole test; afterwards everything is killed."""
STEPS = 30
TINY = str(LAUNCH / "tiny.yaml")


class Node:
    """One command, and what it prints."""

    def __init__(self, cli: Cli, *words: str) -> None:
        self.process = cli.start(*words)
        self.lines: list[str] = []
        streams = (self.process.stdout, self.process.stderr)
        self._threads = [threading.Thread(target=self._read, args=(stream,), daemon=True) for stream in streams]
        for thread in self._threads:
            thread.start()

    def _read(self, stream: Any) -> None:
        with stream:
            for line in stream:
                self.lines.append(line)

    def kill(self) -> None:
        kill_tree(self.process.pid)
        self.process.wait()
        for thread in self._threads:
            thread.join(timeout=5)


def until(is_so: Callable[[], bool], nodes: list[Node], end: float) -> None:
    while not is_so():
        assert time.monotonic() < end, "\n".join("".join(node.lines) for node in nodes)
        time.sleep(0.1)


def recorded(folder: Path) -> int:
    file = folder / "steps.bin"
    return file.stat().st_size // RECORD_BYTES if file.exists() else 0


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(LAUNCH))


@pytest.mark.slow
def test_a_node_that_is_killed_comes_back_and_the_weights_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    """Bug: the other node hangs; the run ends; the node that comes back meets the old attempt, or has other ranks."""
    cli, run, end = Cli(tmp_path), tmp_path / "run", time.monotonic() + _LIMIT
    trust = ("--trust", "tiny_workload")
    checkpoints = ("plugins/checkpoints=save", "plugins.checkpoints.every=5", "plugins/resume=exactly")
    launch = ("launch=torchrun", "launch.processes=1", "launch.nodes=2", f"launch.rdzv=127.0.0.1:{free_port()}")
    more = ("strategy=ddp", f"trainer.max_steps={STEPS}", "model.pause=0.3", f"run_dir={run}")
    nodes = [Node(cli, "train", TINY, *trust, *launch, *checkpoints, *more)]
    try:
        nodes.append(Node(cli, "join", str(run), "--wait", "200", *trust))
        until(lambda: recorded(run) >= 7, nodes, end)
        nodes[1].kill()
        nodes.append(Node(cli, "join", str(run), *trust))
        for node in (nodes[0], nodes[2]):
            try:
                node.process.wait(timeout=max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail("\n".join("".join(each.lines) for each in nodes))
    finally:
        for node in nodes:
            node.kill()
    assert [nodes[0].process.returncode, nodes[2].process.returncode] == [0, 0], "".join(nodes[0].lines)
    first, second = map(json.loads, (run / "attempts.jsonl").read_text().splitlines())
    assert first["cause"] == "killed"
    assert first["ranks"] == [1]
    assert "node 1" in first["message"]
    assert second["from_step"] >= 5
    weights, found = tiny_weights(STEPS), load(run / "checkpoints")["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert not (run / "nodes.json").exists()
