"""Another node's part of a run: connect to node 0, start this node's processes of each attempt, end with the run."""

from __future__ import annotations

import hmac
import queue
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from stabletrain.config.address import Address
from stabletrain.config.problems import ConfigError
from stabletrain.core.intervals import seconds
from stabletrain.errors import UserError
from stabletrain.launch.attempts import ATTEMPT_ENV
from stabletrain.launch.bounded import one_message
from stabletrain.launch.connection import Workers
from stabletrain.launch.hand_over import JOINED_ENV, without_paths_outside
from stabletrain.launch.node_link import Link, connect, proof, read_invitation
from stabletrain.launch.other_nodes import without_store
from stabletrain.launch.process import (
    NodePlace,
    ProcessEnd,
    kill,
    start_process,
    wait_for,
    worker_command,
    worker_environment,
)
from stabletrain.launch.rank_ends import SPARE_ENV, RankEnd, read_exit_codes, spare_folder, write_end
from stabletrain.launch.result import End, Result, read_result
from stabletrain.launch.run_folder import read_run_yaml
from stabletrain.launch.start_up import StartFailed, StartUp, checked, end
from stabletrain.launch.versions import own_versions
from stabletrain.runtime.records.run_files import RUN_YAML

WAITING = "this node leaves the run; a second signal ends at once"
_TRY_AGAIN = 1.0
_ANSWERS_WITHIN = 5.0
_ENDS_WITHIN = 120.0
"""Seconds that processes get to notice that node 0 is gone, beyond the time that they wait for it."""


def join(
    folder: Path,
    *,
    trust: Iterable[str] = (),
    wait: float = 0.0,
    paths_outside: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Start this node's part of each attempt of a run, until the run has ended.

    Args:
        folder: of the run, on a file system that all nodes share.
        trust: packages given by ``--trust``.
        wait: seconds to wait for a run in that folder.
        paths_outside: let the run write where its run.yaml says, also out of its folder. The folder may come from a
            stranger, and only the user knows.
        say: prints a line.

    Returns:
        The run's exit code.

    Raises:
        UserError: if there is no such run, it has ended, or its node 0 cannot be reached or refuses this one.
        StartInterrupted: after a signal outside of an attempt.
    """
    with StartUp() as start_up:
        start_up.doing = WAITING
        config = _config(folder, wait, start_up, paths_outside=paths_outside)
        node = _OtherNode(folder, config, trust, start_up, say)
        while True:
            code = node.take_part()
            if code is not None:
                return code


def _config(folder: Path, wait: float, start_up: StartUp, *, paths_outside: bool) -> dict[str, Any]:
    """The run.yaml of a run that waits for nodes."""
    end = time.monotonic() + wait
    while read_invitation(folder) is None and time.monotonic() < end:
        start_up.check()
        time.sleep(0.2)
    path = folder / RUN_YAML
    if not path.is_file():
        raise UserError(
            f"join: expected the folder of a run, on a file system that this machine shares with its node 0, got "
            f"{folder}, which has no {RUN_YAML}"
        )
    config = without_store(read_run_yaml(path))
    if not paths_outside:
        config = without_paths_outside(config)
    launch = config["launch"]
    if launch.get("kind") != "torchrun" or launch.get("nodes", 1) == 1:
        raise UserError(f"join: the run in {folder} is on one node (launch.nodes); there is nothing to join")
    if read_invitation(folder) is None:
        result = read_result(folder)
        how = f"has ended ({result.end})" if result else "does not wait for nodes; start it on its node 0"
        raise UserError(f"join: the run in {folder} {how}")
    return config


class _OtherNode:
    """This node, in one run."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        trust: Iterable[str],
        start_up: StartUp,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._config, self._start_up, self._say = folder, config, start_up, say
        self._environment = {**worker_environment(config["launch"], trust), JOINED_ENV: "1"}
        self._messages: queue.Queue[Mapping[str, Any]] = queue.Queue()
        self._process: subprocess.Popen[bytes] | None = None
        self._attempt: int | None = None
        self._patience = seconds(config["launch"]["timeout"], name="launch.timeout") + _ENDS_WITHIN
        self._detached = bool(config["launch"].get("detach"))

    def take_part(self) -> int | None:
        """Connect, and take part until the connection ends; return the run's exit code, or None to connect again."""
        link, number = self._connect()
        messages = self._messages
        self._say(f"node {number} of the run in {self._folder}; it begins when all nodes are there")
        try:
            while True:
                message = self._next(messages)
                if "over" in message:
                    self._say(f"the run has ended: {message.get('message')}")
                    return _exit_code(message["over"])
                if "start" in message:
                    self._take_part_in(message, number, link)
                if "lost" in message:
                    self._say("the connection to node 0 has ended")
                    return self._known_end()
        finally:
            link.close()

    def _next(self, messages: queue.Queue[Mapping[str, Any]], within: float = float("inf")) -> Mapping[str, Any]:
        end = time.monotonic() + within
        while True:
            self._start_up.check()
            try:
                return messages.get(timeout=0.2)
            except queue.Empty:
                if time.monotonic() > end:
                    return {"lost": True}

    def _connect(self) -> tuple[Link, int]:
        """Connect to node 0 within the time that nodes wait for each other; it may be about to begin."""
        limit = seconds(self._config["launch"]["join_timeout"], name="launch.join_timeout")
        end, said = time.monotonic() + limit, ""
        while True:
            invitation = read_invitation(self._folder)
            if invitation is None:
                code = self._known_end()
                raise UserError(f"join: the run in {self._folder} has ended" + ("" if code is None else f" ({code})"))
            address, word = invitation.address, invitation.word
            try:
                link = Link(connect(address, _ANSWERS_WITHIN))
            except OSError as error:
                reason = f"{address} cannot be reached ({error.strerror or error})"
            else:
                found = self._introduce(link, word, address)
                if isinstance(found, int):
                    return link, found
                link.close()
                reason = found
            if reason != said:
                self._say(f"{reason}; trying again for {end - time.monotonic():.0f} s")
                said = reason
            if time.monotonic() > end:
                raise UserError(
                    f"join: {reason} for {limit:.0f} s (launch.rdzv, launch.join_timeout); check that node 0 still "
                    "runs, and that this machine reaches that address"
                )
            self._start_up.check()
            time.sleep(_TRY_AGAIN)

    def _introduce(self, link: Link, word: str, address: Address) -> int | str:
        """Return this node's number; or why it has none, for now.

        Raises:
            UserError: if node 0 refuses this node.
        """
        messages: queue.Queue[Mapping[str, Any]] = queue.Queue()
        self._messages = messages
        link.listen(self._heard, self._lost)
        asked, challenge = self._next(messages, within=_ANSWERS_WITHIN).get("challenge"), secrets.token_hex(16)
        if not isinstance(asked, str):
            return f"what listens at {address} is no run"
        known = proof(word, "other node", asked)
        link.send(proof=known, challenge=challenge, host=socket.gethostname(), versions=own_versions())
        answer = self._next(messages, within=_ANSWERS_WITHIN)
        if "refused" in answer:
            raise UserError(f"join: {one_message(str(answer['refused']))}")
        number, knows = answer.get("node"), str(answer.get("proof")).encode("utf-8", "replace")
        knows_word = hmac.compare_digest(knows, proof(word, "node 0", challenge).encode())
        if knows_word and isinstance(number, int) and 0 < number < self._config["launch"]["nodes"]:
            return number
        return "all nodes of the run are there" if "full" in answer else f"what listens at {address} is no run"

    def _heard(self, message: Mapping[str, Any]) -> None:
        """Called by the thread that reads the connection."""
        if "stop" in message:
            if message["stop"] == self._attempt and self._process is not None:
                kill(self._process)
            return
        self._messages.put(message)

    def _lost(self) -> None:
        process = self._process
        if process is not None and not self._detached:
            timer = threading.Timer(self._patience, kill, [process])
            timer.daemon = True
            timer.start()
        self._messages.put({"lost": True})

    def _known_end(self) -> int | None:
        result = read_result(self._folder)
        return result.exit_code if result is not None and read_invitation(self._folder) is None else None

    def _take_part_in(self, message: Mapping[str, Any], number: int, link: Link) -> None:
        attempt, resume = message["start"], message.get("resume")
        place = NodePlace(
            number=number,
            nodes=self._config["launch"]["nodes"],
            host=str(message["host"]),
            port=int(message["port"]),
        )
        config = {**self._config, "resume": resume if isinstance(resume, str) else None}
        with spare_folder() as spare:
            self._attempt = attempt
            try:
                code = self._run(config, place, spare)
            except (ConfigError, StartFailed, UserError) as error:
                self._say(str(error))
                self._write_refusal(error, place)
                code = 1
            finally:
                self._process = self._attempt = None
                self._start_up.doing = WAITING
            exits = {str(rank): each for rank, each in read_exit_codes(spare).items()}
        link.send(ended=attempt, code=code, exits=exits)

    def _run(self, config: dict[str, Any], place: NodePlace, spare: Path | None) -> int:
        environment = {**self._environment, ATTEMPT_ENV: str(self._attempt)}
        if spare is not None:
            environment[SPARE_ENV] = str(spare)
        launch = config["launch"]
        with Workers([config], then="train") as workers:
            command = worker_command(launch, *workers.arguments, place=place)
            self._process = process = start_process(command, environment)
            try:
                problems = checked(workers, process, launch["processes"], self._start_up)
                if problems:
                    raise ConfigError(problems)
                ended: ProcessEnd = wait_for(process, lambda: workers.train(self._folder / RUN_YAML))
            finally:
                end(workers, process)
        return ended.code

    def _write_refusal(self, error: Exception, place: NodePlace) -> None:
        """Let the launcher know why this node's processes did not begin."""
        first = place.number * self._config["launch"]["processes"]
        kind: End = "refused" if isinstance(error, UserError) else "failed"
        message = one_message(f"node {place.number} ({socket.gethostname()}): {error}")
        try:
            write_end(RankEnd(rank=first, result=Result(end=kind, message=message)), self._folder)
        except OSError as failure:
            self._say(f"{self._folder} cannot be written ({failure.strerror or failure})")


def _exit_code(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 256 else 1
