"""Node 0's part of a run on several nodes: it begins the others' part of each attempt, and hears its end."""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stabletrain.config.address import Address
from stabletrain.errors import UserError
from stabletrain.launch.bounded import is_count, one_message, write_json
from stabletrain.launch.node_link import JOIN, Link, open_listener, proof
from stabletrain.launch.rank_ends import RankEnd, read_ends, write_end
from stabletrain.launch.result import Result
from stabletrain.launch.versions import Software, own_versions, refusal, warning

_LOOK_EVERY = 0.2
_HELLO_WITHIN = 10.0
"""Seconds that a new connection gets to say who it is."""
_ENDS_WITHIN = 20.0
"""Seconds that the other nodes' processes get to end by themselves, as those of this node do (`WorkerEnd`)."""
_STOPS_WITHIN = 60.0
"""Seconds that another node gets to end its part of an attempt that has ended here."""
NOTICE_WITHIN = 45.0
"""Seconds in which the processes of this node notice by themselves that another node's are gone, and say so. Those that
wait for their first contact to it would wait for launch.timeout, and are then ended."""


@dataclass(kw_only=True)
class _Node:
    """Another node, as long as its connection lasts."""

    number: int
    host: str
    link: Link
    attempt: int | None = None
    """In which its processes are; None: in none."""


@dataclass(kw_only=True)
class _Attempt:
    number: int
    when_alone: Callable[[], None]
    exits: dict[int, int] = field(default_factory=dict)
    timer: threading.Timer | None = None
    is_over: bool = False
    """Whether this node's part has ended."""


class NodeServer:
    """Waits for the other nodes of a run at an address of this machine.

    Args:
        address: where it listens.
        nodes: of the run, with this one.
        processes: of each node.
        same_versions: whether a node with another version of torch, Lightning or stabletrain is refused.
        say: prints a line.

    Raises:
        UserError: if the address is not this machine's, or its port is taken.
    """

    def __init__(
        self, address: Address, *, nodes: int, processes: int, same_versions: bool, say: Callable[[str], None]
    ) -> None:
        self._address, self._count, self._processes = address, nodes, processes
        self._same_versions, self._say = same_versions, say
        self._word = secrets.token_hex(16)
        self._folder: Path | None = None
        self._changed = threading.Condition()
        self._nodes: dict[int, _Node] = {}
        self._hosts: dict[int, str] = {}
        self._attempt: _Attempt | None = None
        self._own = Software(host=socket.gethostname(), versions=own_versions())
        self._is_closed = False
        self._listener = open_listener(address)

    def invite(self, folder: Path) -> None:
        """Write the address into a run's folder, where the other nodes read it, and begin to accept them.

        Args:
            folder: of the run, on a file system that all nodes share.
        """
        self._folder = folder
        path = folder / JOIN
        path.touch(mode=0o600)
        write_json(path, {"rdzv": str(self._address), "word": self._word})
        os.chmod(path, 0o600)
        threading.Thread(target=self._accept, name="nodes", daemon=True).start()

    def wait_for_all(self, seconds: float, waiting: Callable[[], None]) -> None:
        """Wait until every other node is there, and in no attempt.

        Args:
            seconds: at most.
            waiting: called several times a second; may raise.

        Raises:
            UserError: if a node is missing after that time.
        """
        end = time.monotonic() + seconds
        while missing := self._missing():
            waiting()
            if time.monotonic() > end:
                raise UserError(
                    f"launch.join_timeout: after {seconds:.0f} s, {missing} of the {self._count} nodes "
                    f"{'has' if missing == 1 else 'have'} not come to {self._address}; on each other node start "
                    f"stabletrain join {self._folder}, and check that it reaches this address"
                )

    def begin(self, attempt: int, port: int, resume: str | None, when_alone: Callable[[], None]) -> None:
        """Let the other nodes begin their part of an attempt.

        Args:
            attempt: its number.
            port: at which the processes find each other, on this machine.
            resume: the checkpoint from which it goes on; None: from new weights.
            when_alone: called some time after another node has failed or was lost, if this node's part still runs.
        """
        with self._changed:
            self._attempt = _Attempt(number=attempt, when_alone=when_alone)
            nodes = list(self._nodes.values())
            for node in nodes:
                node.attempt = attempt
        for node in nodes:
            node.link.send(start=attempt, port=port, host=self._address.host, resume=resume)

    def end(self) -> dict[int, int]:
        """End what is left of an attempt on the other nodes; return the exit codes of their processes that failed."""
        with self._changed:
            ended = self._attempt
            if ended is None:
                return {}
            ended.is_over = True
            if ended.timer is not None:
                ended.timer.cancel()
        for node in self._still_in_attempt(_ENDS_WITHIN):
            node.link.send(stop=ended.number)
        for node in self._still_in_attempt(_STOPS_WITHIN):  # it must come again
            node.link.close()
        with self._changed:
            self._attempt = None
            return ended.exits

    def _still_in_attempt(self, seconds: float) -> list[_Node]:
        """The nodes whose processes have not ended after some seconds."""
        end = time.monotonic() + seconds
        with self._changed:
            while left := [node for node in self._nodes.values() if node.attempt is not None]:
                if time.monotonic() > end:
                    break
                self._changed.wait(_LOOK_EVERY)
            return left

    def close(self, result: Result) -> None:
        """Tell the other nodes that the run has ended, and stop listening.

        Args:
            result: how.
        """
        self.end()
        if self._folder is not None:
            with contextlib.suppress(OSError):
                (self._folder / JOIN).unlink()
        with self._changed:
            nodes, self._nodes, self._count = list(self._nodes.values()), {}, 1
        for node in nodes:
            node.link.send(over=result.exit_code, message=f"{result.end}: {result.message}")
            node.link.close()
        self._is_closed = True
        with contextlib.suppress(OSError):  # wakes the thread that accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _missing(self) -> int:
        with self._changed:
            here = sum(node.attempt is None for node in self._nodes.values())
            if here + 1 < self._count:
                self._changed.wait(_LOOK_EVERY)
            return self._count - 1 - here

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._is_closed:
                    return
                time.sleep(_LOOK_EVERY)  # too many open files, or a connection that was given up: others may come
                continue
            link = Link(connection)
            newcomer = _Newcomer(self, link)
            patience = threading.Timer(_HELLO_WITHIN, newcomer.give_up)
            patience.daemon = True
            patience.start()
            link.send(challenge=newcomer.challenge)
            link.listen(newcomer.heard, newcomer.lost)

    def admit(self, link: Link, hello: Mapping[str, Any], challenge: str) -> _Node | None:
        """Give a newcomer a number, or say why it gets none.

        Args:
            link: to it.
            hello: what it says of itself.
            challenge: that it got.
        """
        known, asked, host, versions = (hello.get(name) for name in ("proof", "challenge", "host", "versions"))
        if not (isinstance(known, str) and isinstance(asked, str)):
            return None
        if not (isinstance(host, str) and isinstance(versions, dict)):
            return None
        if not hmac.compare_digest(known.encode(), proof(self._word, "other node", challenge).encode()):
            link.send(refused="this is another run's address: the folder and the run do not belong together")
            return None
        host = one_message(host, 255)
        software = [
            self._own,
            Software(host=host, versions={str(k): one_message(str(v), 64) for k, v in versions.items()}),
        ]
        refused = refusal(software) if self._same_versions else None
        if refused:
            self._say(f"{host} cannot join: {refused}")
            link.send(refused=refused)
            return None
        with self._changed:
            free = [number for number in range(1, self._count) if number not in self._nodes]
            if not free:
                link.send(full=True)
                return None
            number = next((each for each in free if self._hosts.get(each) == host), free[0])
            node = self._nodes[number] = _Node(number=number, host=host, link=link)
            self._hosts[number] = host
            self._changed.notify_all()
            left = self._count - 1 - len(self._nodes)
        different = warning(software, also_decisive=not self._same_versions)
        if different:
            self._say(f"warning: {different}")
        self._say(f"node {number} is there: {host}" + (f"; waiting for {left} more" if left else ""))
        link.send(node=number, proof=proof(self._word, "node 0", asked))
        return node

    def heard(self, node: _Node, message: Mapping[str, Any]) -> None:
        """Note that a node has ended its part of an attempt.

        Args:
            node: that says so.
            message: with the exit code of its part, and those of its processes.
        """
        code, exits = message.get("code"), message.get("exits")
        if message.get("ended") != node.attempt or not isinstance(code, int) or not isinstance(exits, dict):
            return
        with self._changed:
            node.attempt = None
            if self._attempt is not None:
                known = {int(rank): exit for rank, exit in exits.items() if str(rank).isdecimal() and _is_code(exit)}
                self._attempt.exits.update(known)
                if code != 0:
                    self._note_trouble(self._attempt)
            self._changed.notify_all()

    def lost(self, node: _Node) -> None:
        """Note that a node's connection has ended; if it was in an attempt, that is how its processes have ended.

        Args:
            node: that is lost.
        """
        with self._changed:
            if self._nodes.get(node.number) is not node:
                return
            if self._attempt is not None and node.attempt is not None:
                self._note_trouble(self._attempt)
            if node.attempt is not None:
                self._write_end(node)  # before `end` returns, after which it is read
            del self._nodes[node.number]
            self._changed.notify_all()
        self._say(f"node {node.number} ({node.host}) is gone")

    def _note_trouble(self, attempt: _Attempt) -> None:
        if attempt.timer is None and not attempt.is_over:
            attempt.timer = threading.Timer(NOTICE_WITHIN, attempt.when_alone)
            attempt.timer.daemon = True
            attempt.timer.start()

    def _write_end(self, node: _Node) -> None:
        """Write how the processes of a lost node have ended, unless one of them has written that itself."""
        assert self._folder is not None
        first = node.number * self._processes
        ranks = range(first, first + self._processes)
        if any(end.rank in ranks for end in read_ends(self._folder)):
            return
        which = f"rank {first}" if self._processes == 1 else f"ranks {first} to {ranks[-1]}"
        message = f"node {node.number} ({node.host}, {which}) is gone: the connection to it has ended"
        with contextlib.suppress(OSError):
            write_end(RankEnd(rank=first, result=Result(end="killed", message=message), host=node.host), self._folder)


class _Newcomer:
    """A connection; of a node, once it has said the word."""

    def __init__(self, server: NodeServer, link: Link) -> None:
        self._server, self._link = server, link
        self.challenge = secrets.token_hex(16)
        self._node: _Node | None = None

    def heard(self, message: Mapping[str, Any]) -> None:
        if self._node is not None:
            self._server.heard(self._node, message)
            return
        self._node = self._server.admit(self._link, message, self.challenge)
        if self._node is None:
            self._link.close()

    def lost(self) -> None:
        if self._node is not None:
            self._server.lost(self._node)

    def give_up(self) -> None:
        if self._node is None:
            self._link.close()


def _is_code(value: object) -> bool:
    return isinstance(value, int) and (is_count(value) or is_count(-value))
