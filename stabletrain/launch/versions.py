"""Compare the software of a run's nodes: another version of torch computes other bits, and perhaps another protocol."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stabletrain.errors import UserError
from stabletrain.version import __version__

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_logger = logging.getLogger("stabletrain")

KEY = "launch.same_versions"
DECISIVE = ("torch", "lightning", "stabletrain")
"""Packages that compute what is trained: one version on all nodes."""
_OTHERS = ("python", "numpy")
_MOST_HOSTS = 3


@dataclass(frozen=True, kw_only=True)
class Software:
    """The versions of one process.

    Args:
        host: on which it runs.
        versions: by package.
    """

    host: str
    versions: Mapping[str, str]


def own_versions() -> dict[str, str]:
    """Return the versions of this process's Python and of the packages that are compared. Imports none of them."""
    found = {"python": platform.python_version(), "stabletrain": __version__}
    for name in ("torch", "lightning", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def differences(nodes: Sequence[Software], names: Sequence[str] = (*DECISIVE, *_OTHERS)) -> list[str]:
    """Return what differs between nodes, one text for each package.

    Args:
        nodes: at least one; several processes of one host may be among them.
        names: packages to compare.

    >>> both = [Software(host="a", versions={"torch": "2.13.0"}), Software(host="b", versions={"torch": "2.12.1"})]
    >>> differences(both, ["torch"])
    ['torch: 2.13.0 on a, 2.12.1 on b']
    """
    texts = []
    for name in names:
        hosts: dict[str, list[str]] = {}
        for node in nodes:
            of_version = hosts.setdefault(node.versions.get(name, "unknown"), [])
            if node.host not in of_version:
                of_version.append(node.host)
        if len(hosts) > 1:
            texts.append(f"{name}: " + ", ".join(f"{version} on {_shown(names)}" for version, names in hosts.items()))
    return texts


def refusal(nodes: Sequence[Software]) -> str | None:
    """Return why a run on these nodes is refused; None if their decisive packages are the same.

    Args:
        nodes: of the run.
    """
    found = differences(nodes, DECISIVE)
    if not found:
        return None
    return (
        f"the nodes of the run have different software ({'; '.join(found)}): what they compute would differ; install "
        f"the same versions, or allow it with {KEY}=false"
    )


def warning(nodes: Sequence[Software], *, also_decisive: bool) -> str | None:
    """Return what to tell the user of differences with which the run goes on; None if there are none.

    Args:
        nodes: of the run.
        also_decisive: whether differences of the decisive packages are allowed, and so among these.
    """
    found = differences(nodes, (*DECISIVE, *_OTHERS) if also_decisive else _OTHERS)
    return f"the nodes of the run have different software: {'; '.join(found)}" if found else None


def check_nodes(trainer: Trainer, *, same_versions: bool) -> None:
    """Compare the software of all nodes of a fit. A collective, if there are several nodes; else nothing.

    Args:
        trainer: in a fit, before its first step.
        same_versions: the config key ``launch.same_versions``.

    Raises:
        UserError: on all ranks, if the nodes compute with different packages, and that is not allowed.
    """
    if trainer.num_nodes == 1:
        return
    from stabletrain.runtime.ranks import Ranks

    found = Ranks(trainer).gather((socket.gethostname(), own_versions()))
    nodes = [Software(host=host, versions=versions) for host, versions in found]
    refused = refusal(nodes) if same_versions else None
    if refused:
        raise UserError(refused)
    different = warning(nodes, also_decisive=not same_versions)
    if different and trainer.is_global_zero:
        _logger.warning("%s", different)


def _shown(hosts: Sequence[str]) -> str:
    more = len(hosts) - _MOST_HOSTS
    return " and ".join(hosts) if more <= 0 else f"{', '.join(hosts[:_MOST_HOSTS])} and {more} more"
