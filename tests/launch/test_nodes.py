"""How the nodes of a run meet: addresses, who may join, and what is known of a node that is gone."""

import errno
import queue
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stabletrain.config.address import Address, parse_address
from stabletrain.errors import UserError
from stabletrain.launch import join as joining
from stabletrain.launch.attempts import ATTEMPT_ENV
from stabletrain.launch.join import join
from stabletrain.launch.node_link import JOIN, Link, connect, free_port, open_listener, proof, read_invitation
from stabletrain.launch.node_server import NodeServer
from stabletrain.launch.other_nodes import join_line
from stabletrain.launch.rank_ends import RankEnd, read_ends, write_end
from stabletrain.launch.result import Result
from stabletrain.launch.run_folder import write_run_yaml
from stabletrain.launch.start_up import StartFailed, StartUp
from stabletrain.launch.versions import own_versions


class OtherNode:
    """A connection to node 0, and what it says."""

    def __init__(self, folder: Path, host: str = "b", word: str | None = None, **versions: str) -> None:
        invitation = read_invitation(folder)
        assert invitation is not None
        self.said: queue.Queue[dict[str, Any]] = queue.Queue()
        self.link = Link(connect(invitation.address, 5.0))
        self.link.listen(lambda message: self.said.put(dict(message)), lambda: self.said.put({"lost": True}))
        known = proof(invitation.word if word is None else word, "other node", self.hears()["challenge"])
        self.link.send(proof=known, challenge="7", host=host, versions={**own_versions(), **versions})
        self._expected = proof(invitation.word, "node 0", "7")

    def hears(self) -> dict[str, Any]:
        message = self.said.get(timeout=20)
        if "node" in message:
            assert message.pop("proof") == self._expected
        return message


class Server(NodeServer):
    lines: list[str]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with_two = make_server()
    with_two.invite(tmp_path)
    yield with_two
    with_two.close(Result(end="finished"))


def make_server(*, same_versions: bool = True) -> Server:
    lines: list[str] = []
    address = Address(host="127.0.0.1", port=free_port())
    made = Server(address, nodes=2, processes=2, same_versions=same_versions, say=lines.append)
    made.lines = lines
    return made


def nothing() -> None:
    pass


class SilentLink(Link):
    def __init__(self) -> None:
        """Without a connection."""

    def send(self, **message: Any) -> bool:
        return True


@pytest.mark.parametrize(
    "text", ["node", "node:", ":29400", "node:0", "node:65536", "node:²", "a b:1", "::1:29400", ""]
)
def test_an_address_is_a_host_and_a_port(text: str) -> None:
    """Bug: a port that no machine has, or half of an IPv6 address as the host, found only when the nodes wait."""
    with pytest.raises(UserError, match=r"launch\.rdzv: expected HOST:PORT"):
        parse_address(text)


def test_an_address_of_another_machine_and_a_taken_port_are_refused() -> None:
    """Bug: node 0 listens at an address that the other nodes do not use, and all wait until the time is over."""
    with pytest.raises(UserError, match=r"192\.0\.2\.7, which is no address of this machine \(it has"):
        open_listener(Address(host="192.0.2.7", port=29400))
    with open_listener(Address(host="127.0.0.1", port=free_port())) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port} .*choose a free port"):
            open_listener(Address(host="127.0.0.1", port=port))


def test_only_nodes_with_the_word_of_the_folder_and_the_same_software_join(server: Server, tmp_path: Path) -> None:
    """Bug: a node of another run, or one with another torch, becomes part of this run."""
    assert "another run's address" in OtherNode(tmp_path, word="wrong").hears()["refused"]
    refused = OtherNode(tmp_path, host="old-one", torch="1.0").hears()["refused"]
    assert re.search(r"torch: \S+ on \S+, 1\.0 on old-one", refused)
    assert any("old-one cannot join" in line for line in server.lines)
    with pytest.raises(UserError, match=r"launch\.join_timeout: after 0 s, 1 of the 2 nodes has not come"):
        server.wait_for_all(0.0, nothing)
    assert OtherNode(tmp_path, numpy="1.0").hears() == {"node": 1}
    assert any("numpy" in line and "1.0 on b" in line for line in server.lines)
    server.wait_for_all(10.0, nothing)
    assert OtherNode(tmp_path).hears() == {"full": True}


def test_other_software_is_a_warning_if_that_is_allowed(tmp_path: Path) -> None:
    """Bug: launch.same_versions=false is not obeyed, or says nothing."""
    server = make_server(same_versions=False)
    server.invite(tmp_path)
    assert OtherNode(tmp_path, torch="1.0").hears() == {"node": 1}
    assert any("torch" in line and "1.0 on b" in line for line in server.lines)
    server.close(Result(end="finished"))


def test_a_lost_node_is_a_cause_and_comes_back_as_the_same_node(server: Server, tmp_path: Path) -> None:
    """Bug: the run ends with "connection closed by peer" of the nodes that are left, and the node cannot come back."""
    first = OtherNode(tmp_path)
    assert first.hears() == {"node": 1}
    server.wait_for_all(10.0, nothing)
    server.begin(1, 4711, None, nothing)
    assert first.hears() == {"start": 1, "port": 4711, "host": "127.0.0.1", "resume": None}
    first.link.close()
    assert server.end() == {}  # waits until the node is known to be gone
    (end,) = read_ends(tmp_path)
    assert (end.rank, end.result.end, end.host) == (2, "killed", "b")
    assert "node 1 (b, ranks 2 to 3) is gone" in end.result.message
    again = OtherNode(tmp_path)
    assert again.hears() == {"node": 1}
    server.wait_for_all(10.0, nothing)
    write_end(RankEnd(rank=3, result=Result(end="failed", message="a bug")), tmp_path)
    server.begin(2, 4712, "/a", nothing)
    assert again.hears()["resume"] == "/a"
    again.link.send(ended=2, code=1, exits={"3": 1, "x": 5, "4": "no"})
    server.wait_for_all(10.0, nothing)
    assert server.end() == {3: 1}
    server.close(Result(end="failed", message="a bug"))
    assert again.hears() == {"over": 1, "message": "failed: a bug"}
    assert not (tmp_path / JOIN).exists()


def test_what_cannot_be_joined_is_one_message(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: join waits for ever for a run that is not there, has ended, or has no node 0 any more."""
    with pytest.raises(UserError, match="expected the folder of a run"):
        join(tmp_path / "nowhere")
    monkeypatch.setattr("stabletrain.launch.join._ANSWERS_WITHIN", 0.2)
    folder = Path(config["run_dir"])
    folder.mkdir()
    write_run_yaml(config)
    with pytest.raises(UserError, match="is on one node"):
        join(folder)
    launch = {"kind": "torchrun", "processes": 1, "nodes": 2, "threads": 1, "timeout": 5, "join_timeout": 1}
    write_run_yaml({**config, "launch": launch})
    with pytest.raises(UserError, match="does not wait for nodes"):
        join(folder)
    Result(end="stopped").write(folder)
    with pytest.raises(UserError, match=r"has ended \(stopped\)"):
        join(folder)
    (folder / JOIN).write_text(f'{{"rdzv": "127.0.0.1:{free_port()}", "word": "x"}}')
    with pytest.raises(UserError, match=r"cannot be reached .*refused.* for 1 s"):
        join(folder, say=lambda line: None)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (folder / JOIN).write_text(f'{{"rdzv": "127.0.0.1:{silent.getsockname()[1]}", "word": "x"}}')
        with pytest.raises(UserError, match="is no run for 1 s"):
            join(folder, say=lambda line: None)


def test_a_connection_that_cannot_be_accepted_is_not_the_last_one(tmp_path: Path) -> None:
    """Bug: too many open files, as after a port scan, and no node can come any more: all wait in vain."""

    class Failing:
        """A listener of which one call fails."""

        def __init__(self, inner: socket.socket) -> None:
            self._inner, self._fails = inner, True

        def accept(self) -> Any:
            if self._fails:
                self._fails = False
                raise OSError(errno.EMFILE, "Too many open files")
            return self._inner.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    made = make_server()
    made._listener = Failing(made._listener)  # type: ignore[assignment]
    made.invite(tmp_path)
    try:
        assert OtherNode(tmp_path).hears() == {"node": 1}
    finally:
        made.close(Result(end="finished"))


def test_the_processes_of_another_node_know_their_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: on the other nodes each attempt is the first: logs in its folder, and another answer to whether the run was
    restarted than on node 0, upon which the ranks call different collectives."""
    found: list[str] = []

    def start(command: list[str], environment: dict[str, str]) -> None:
        found.append(environment[ATTEMPT_ENV])
        raise StartFailed("no process is needed here")

    monkeypatch.setattr(joining, "start_process", start)
    config = {"launch": {"kind": "torchrun", "processes": 1, "nodes": 2, "threads": 1, "timeout": 300}}
    node = joining._OtherNode(tmp_path, config, (), StartUp(), lambda line: None)
    node._take_part_in({"start": 3, "host": "127.0.0.1", "port": 1}, 1, SilentLink())
    assert found == ["3"]


def test_who_does_not_know_the_word_does_not_lead_a_node(tmp_path: Path) -> None:
    """Bug: node 0 was killed, and another user of its machine listens at its port: he hears the word, and the other
    nodes connect their processes to wherever he says."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def lead() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b'{"challenge": "1"}\n{"node": 1, "proof": "2"}\n')
                heard.append(connection.recv(4096))

        threading.Thread(target=lead, daemon=True).start()
        config = {"launch": {"kind": "torchrun", "processes": 1, "nodes": 2, "threads": 1, "timeout": 300}}
        node = joining._OtherNode(tmp_path, config, (), StartUp(), lambda line: None)
        address = Address(host="127.0.0.1", port=listener.getsockname()[1])
        assert "is no run" in str(node._introduce(Link(connect(address, 5.0)), "secret", address))
    assert b"secret" not in heard[0]


def test_the_line_for_the_other_nodes(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bugs: a run.yaml from elsewhere leads the output of the other nodes to any file; the user's own run cannot be
    joined with the printed line; each run with MLflow seems to write outside of its folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path(config["run_dir"])
    launch = {"kind": "torchrun", "processes": 1, "nodes": 2, "threads": 1, "timeout": 5, "join_timeout": 1}
    own = {**config, "launch": launch, "trust": ["mine"], "logger": {"tracking_uri": "sqlite:////a/b.db"}}
    assert join_line(own) == f"cd {tmp_path} && stabletrain join {folder} --trust mine"
    outside = {**own, "callbacks": {"save": {"_target_": "a.B", "dirpath": "/somewhere"}}}
    assert join_line(outside).endswith(" --paths-outside")
    folder.mkdir()
    write_run_yaml(outside)
    with pytest.raises(UserError, match=r"callbacks\.save\.dirpath: .*--paths-outside"):
        join(folder)
    with pytest.raises(UserError, match="does not wait for nodes"):
        join(folder, paths_outside=True)
