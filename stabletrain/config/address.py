"""The address at which the nodes of a run meet, ``launch.rdzv``."""

from __future__ import annotations

from dataclasses import dataclass

from stabletrain.errors import UserError

KEY = "launch.rdzv"


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where node 0 listens.

    Args:
        host: name or IP address.
        port: 1 to 65535.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Return the address of ``host:port``, or ``[IPv6 address]:port``.

    Args:
        text: the config key ``launch.rdzv``.

    Raises:
        UserError: if it has another form.

    >>> parse_address("node-a:29400"), parse_address("[::1]:29400").host
    (Address(host='node-a', port=29400), '::1')
    """
    host, colon, port = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    fits = colon and host and host.isprintable() and not any(map(str.isspace, host)) and (bracketed or ":" not in host)
    if not fits or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65_536):
        raise UserError(
            f"{KEY}: expected HOST:PORT, the name or address of the node that starts the run and a free port of it, "
            f"such as node-a:29400, got {text!r:.200}"
        )
    return Address(host=host, port=int(port))
