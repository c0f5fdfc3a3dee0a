"""The connection between the nodes of a run: lines of JSON over TCP, from each other node to node 0.

What travels says when an attempt begins and ends, never what is executed: that is in run.yaml, in the run's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import json
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stabletrain.config.address import KEY, Address, parse_address
from stabletrain.errors import UserError
from stabletrain.launch.bounded import read_json

JOIN = "nodes.json"
"""File in the run's folder, while the run lasts: address of node 0, and a word that both sides prove to know."""

_MAX_LINE = 65_536
_SECONDS_SILENT = 5
"""Seconds between the system's probes of a silent connection; a machine without power is noticed after five of them."""


class Link:
    """One connection. A thread reads it, and calls ``heard`` with each message, and ``lost`` once when it has ended.

    Args:
        connection: an open socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        connection.settimeout(None)
        _notice_silence(connection)

    def listen(self, heard: Callable[[Mapping[str, Any]], None], lost: Callable[[], None]) -> None:
        """Begin to read.

        Args:
            heard: called with each message.
            lost: called at the end of the connection, whoever ended it.
        """
        threading.Thread(target=self._read, args=(heard, lost), name="node", daemon=True).start()

    def send(self, **message: Any) -> bool:
        """Send a message; False if the connection has ended.

        Args:
            message: plain values by name.
        """
        try:
            with self._sending:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, heard: Callable[[Mapping[str, Any]], None], lost: Callable[[], None]) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                while (line := lines.readline(_MAX_LINE)).endswith(b"\n"):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        heard(message)
        except (OSError, ValueError, RecursionError):  # the other machine is gone; or it is none of ours
            pass
        finally:
            self.close()
            lost()


def _notice_silence(connection: socket.socket) -> None:
    """Let the system end the connection if the other machine does not answer any more."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted = {"TCP_KEEPIDLE": _SECONDS_SILENT, "TCP_KEEPINTVL": _SECONDS_SILENT, "TCP_KEEPCNT": 4}
    for name, value in {**wanted, "TCP_USER_TIMEOUT": 5_000 * _SECONDS_SILENT}.items():
        if hasattr(socket, name):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def open_listener(address: Address) -> socket.socket:
    """Return a socket of node 0 that listens at an address.

    Args:
        address: of this machine.

    Raises:
        UserError: if the host is not this machine, or the port is taken.
    """
    family, place = _resolve(address)
    own = _own_addresses()
    if place not in own and not ipaddress.ip_address(place).is_loopback:
        shown = ", ".join(sorted(each for each in own if not ipaddress.ip_address(each).is_loopback)) or "none"
        raise UserError(
            f"{KEY}: {address.host} is {place}, which is no address of this machine (it has {shown}); start the run on "
            "that machine, or give this one's name or address"
        )
    # a machine's own name may mean 127.0.1.1 on itself, where the other nodes cannot connect
    named_loopback = address.host in ("localhost", "::1") or address.host.startswith("127.")
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((place if named_loopback else "", address.port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(
            f"{KEY}: cannot listen at {address} ({error.strerror or error}); choose a free port, or end what uses it"
        ) from None
    return listener


def proof(word: str, side: Literal["node 0", "other node"], challenge: str) -> str:
    """Return what proves to know the word of a run's folder, without telling it.

    Args:
        word: of the folder.
        side: that proves it.
        challenge: of the other side, never used before.
    """
    return hmac.new(word.encode("utf-8", "replace"), f"{side} {challenge}".encode(), hashlib.sha256).hexdigest()


def connect(address: Address, seconds: float) -> socket.socket:
    """Return a connection to node 0.

    Args:
        address: of node 0.
        seconds: to wait for its answer.

    Raises:
        OSError: if nobody listens there, or the host is unknown.
    """
    return socket.create_connection((address.host, address.port), timeout=seconds)


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """What a run's folder says to the other nodes.

    Args:
        address: of node 0.
        word: proves to node 0 that this one knows the folder.
    """

    address: Address
    word: str


def read_invitation(folder: Path) -> Invitation | None:
    """Return the invitation in a run's folder; None if the run does not wait for nodes.

    Args:
        folder: of the run.
    """
    try:
        content = read_json(folder / JOIN)
        return Invitation(address=parse_address(content["rdzv"]), word=str(content["word"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError):
        return None


def _resolve(address: Address) -> tuple[socket.AddressFamily, str]:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{KEY}: the host {address.host!r} is unknown here ({reason}); give this machine's") from None
    family, *_, place = found[0]
    return family, str(place[0]).partition("%")[0]


def _own_addresses() -> set[str]:
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    every = [each for several in psutil.net_if_addrs().values() for each in several]
    return {each.address.partition("%")[0] for each in every if each.family in families}
