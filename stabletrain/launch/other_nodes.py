"""The launcher's view of a run on several nodes with torchrun: who else takes part, and this machine's place."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stabletrain.config.address import parse_address
from stabletrain.config.outputs import check_outputs
from stabletrain.config.problems import ConfigError, Problem
from stabletrain.core.intervals import seconds
from stabletrain.errors import UserError
from stabletrain.launch.node_link import free_port
from stabletrain.launch.node_server import NodeServer
from stabletrain.launch.process import NodePlace
from stabletrain.launch.result import Result, read_result


def has_other_nodes(config: Mapping[str, Any]) -> bool:
    """Return whether a run has nodes that are started by hand.

    Args:
        config: composed, or the content of run.yaml.
    """
    launch = config.get("launch") or {}
    return launch.get("kind") == "torchrun" and int(launch.get("nodes", 1)) > 1


def without_store(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run.yaml without the tracking store, to which only rank 0 writes, which is on node 0.

    Args:
        config: the content of run.yaml.
    """
    logger = config.get("logger")
    return {**config, "logger": {**logger, "tracking_uri": None} if isinstance(logger, Mapping) else logger}


def join_line(config: Mapping[str, Any]) -> str:
    """Return what a user types on each other node, in the folder from which relative paths and own packages are.

    Args:
        config: the content of run.yaml.
    """
    words = ["stabletrain", "join", str(config["run_dir"])]
    words += [word for name in config.get("trust") or () for word in ("--trust", name)]
    if next(check_outputs({**without_store(config), "run_dir": None, "launch": None}, ()), None) is not None:
        words.append("--paths-outside")  # as its user has typed on this node
    return f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"


class OtherNodes:
    """The other nodes of a run.

    Args:
        config: the content of run.yaml.
        say: prints a line.

    Raises:
        UserError: if the address at which they are to meet is not this machine's, or its port is taken.
    """

    def __init__(self, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
        launch = config["launch"]
        self._folder = Path(config["run_dir"])
        self._line = join_line(config)
        self._count, self._say = launch["nodes"], say
        self._limit = seconds(launch["join_timeout"], name="launch.join_timeout")
        self._address = parse_address(launch["rdzv"])
        self._server = NodeServer(
            self._address,
            nodes=launch["nodes"],
            processes=launch["processes"],
            same_versions=launch.get("same_versions", True),
            say=say,
        )

    def invite(self) -> None:
        """Say how the other nodes are started, and begin to accept them. The run's folder is there."""
        self._server.invite(self._folder)
        count = self._count - 1
        self._say(f"start on {f'each of the {count} other nodes' if count > 1 else 'the other node'}:")
        self._say(f"  {self._line}")

    def gather(self, waiting: Callable[[], None], *, number: int) -> NodePlace:
        """Wait for all nodes; return this one's place in an attempt.

        Args:
            waiting: called several times a second; may raise.
            number: of the attempt.

        Raises:
            UserError: if nodes are missing; of a further attempt, a `ConfigError`, which ends the run.
        """
        try:
            self._server.wait_for_all(self._limit, waiting)
        except UserError as error:
            if number == 1:
                raise
            key, _, text = str(error).partition(": ")
            raise ConfigError([Problem(key, text)]) from None
        return NodePlace(number=0, nodes=self._count, host=self._address.host, port=free_port())

    def begin(self, number: int, place: NodePlace, resume: str | None, when_alone: Callable[[], None]) -> None:
        """Let the other nodes begin their part of an attempt.

        Args:
            number: of the attempt.
            place: of this node.
            resume: where the attempt goes on.
            when_alone: ends this node's part, if another node's has failed and this one does not notice.
        """
        self._server.begin(number, place.port, resume, when_alone)

    def end(self) -> dict[int, int]:
        """End the other nodes' part of an attempt; return the exit codes of their processes that failed."""
        return self._server.end()

    def close(self) -> None:
        """The run has ended: let the other nodes know how."""
        result = read_result(self._folder) or Result(end="failed", message="node 0 has ended before training")
        self._server.close(result)


@contextmanager
def other_nodes(config: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[OtherNodes]:
    """Listen for the other nodes of a run while the block lasts.

    Args:
        config: the content of run.yaml; see `has_other_nodes`.
        say: prints a line.
    """
    nodes = OtherNodes(config, say)
    try:
        yield nodes
    finally:
        nodes.close()
