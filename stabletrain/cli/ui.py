"""``stabletrain ui``: MLflow's web interface for the runs of a store, until Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from stabletrain.errors import UserError
from stabletrain.tracking.addresses import home_url, server_of
from stabletrain.tracking.latest import latest_pages
from stabletrain.tracking.server import PortTaken, ServerFailed, free_port, is_healthy, local_server_for
from stabletrain.tracking.store import absolute_uri, default_tracking_uri, ensure_store, require_store

_HOSTED = ("databricks", "uc")
"""Beginnings of stores without an address of their own."""
_MOST_STARTS = 5
"""How often a port is chosen anew because another program was faster."""


def serve(uri: str | None, host: str, port: int) -> None:
    """Start MLflow's server, print the addresses of its pages once it answers, and wait until a signal ends it.

    Args:
        uri: MLflow tracking URI; None: the default store.
        host: on which the server listens.
        port: the wanted one; if it is in use, the next free one is taken.

    Raises:
        UserError: if the store, the host or the port cannot be used.
        typer.Exit: with 1, after a message, if the server fails.
    """
    is_given = uri is not None
    uri = absolute_uri(uri) if uri else default_tracking_uri()
    if is_given:  # a mistyped one must not become an empty store
        require_store(uri)
    ensure_store(uri)
    if "://" not in uri and not uri.startswith(_HOSTED):  # a folder, which the server would look for in its own
        uri = str(Path(uri).absolute())
    if (server := server_of(uri)) is not None:
        _show_running(uri, server)
        return
    if uri.startswith(_HOSTED):
        raise UserError(f"ui: {uri} has pages of its own; open your workspace's address")
    print(f"starting MLflow's server for {uri}", flush=True)
    try:
        for _ in range(_MOST_STARTS):
            chosen = free_port(host, port)
            if chosen != port:
                print(f"port {port} is in use; the next free one is {chosen}", flush=True)
            try:
                with local_server_for(uri, host, chosen) as running:
                    pages = list(latest_pages(uri, running.address))  # while the server starts
                    running.wait_until_ready()
                    _show(running.address, pages, host)
                    running.wait()
            except PortTaken:
                continue
        raise ServerFailed(f"other programs take every port from {port} on before MLflow's server does; give --port")
    except ServerFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _show_running(uri: str, server: str) -> None:
    if not is_healthy(server):
        raise UserError(
            f"ui: the store {server} is a server that does not respond; start it, or name another store with --uri or "
            "MLFLOW_TRACKING_URI"
        )
    print(f"the store is a server, which runs already:\n{home_url(server)}")
    for name, address in latest_pages(uri, server):
        print(f"  {name}: {address}")


def _show(address: str, pages: Sequence[tuple[str, str]], host: str) -> None:
    print(home_url(address))
    for name, page in pages:
        print(f"  {name}: {page}")
    if host in ("0.0.0.0", "::"):
        print(
            "whoever reaches this machine can read and change the runs, under its private addresses (10.*, 172.16.*, "
            "192.168.*); for other names set MLFLOW_SERVER_ALLOWED_HOSTS"
        )
    print("Ctrl-C ends it", flush=True)
