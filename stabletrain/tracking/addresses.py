"""Addresses of pages in MLflow's web interface.

Each one has ``workflowType=machine_learning``: without it, MLflow 3.17 opens on its side for language models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from urllib.parse import quote, urlsplit, urlunsplit

LOCAL_HOST = "127.0.0.1"
"""Host of ``stabletrain ui``, unless another one is given."""
LOCAL_PORT = 5000
"""Port of ``stabletrain ui``, unless another one is given, or it is in use."""
MOST_COMPARED = 50
"""Runs on one page: it sends several requests for each of them."""

_WORKFLOW = "workflowType=machine_learning"


def local_server(host: str = LOCAL_HOST, port: int = LOCAL_PORT) -> str:
    """Return the address of a server on this machine, as a browser on it can open it.

    Args:
        host: on which the server listens; a name or an address.
        port: of the server.

    >>> local_server(), local_server("::", 5001), local_server("0.0.0.0")
    ('http://127.0.0.1:5000', 'http://[::1]:5001', 'http://127.0.0.1:5000')
    """
    reachable = {"0.0.0.0": LOCAL_HOST, "": LOCAL_HOST, "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def server_of(uri: str) -> str | None:
    """Return the address of the server that a store is, without user and password; None for a store without one.

    Args:
        uri: MLflow tracking URI.

    >>> server_of("https://me:secret@tracking.example.org/mlflow/"), server_of("sqlite:////data/mlflow.db")
    ('https://tracking.example.org/mlflow', None)
    """
    if not uri.startswith(("http://", "https://")):
        return None
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def home_url(server: str) -> str:
    """Return the address of the list of experiments.

    Args:
        server: address of the server.

    >>> home_url("http://127.0.0.1:5000")
    'http://127.0.0.1:5000/#/experiments?workflowType=machine_learning'
    """
    return _page(server, "experiments")


def experiment_url(server: str, experiment_id: str) -> str:
    """Return the address of the table of an experiment's runs.

    Args:
        server: address of the server.
        experiment_id: its id, not its name.

    >>> experiment_url("http://127.0.0.1:5000", "1")
    'http://127.0.0.1:5000/#/experiments/1/runs?compareRunsMode=TABLE&workflowType=machine_learning'
    """
    return _page(server, f"experiments/{quote(experiment_id, safe='')}/runs", "compareRunsMode=TABLE")


def run_url(server: str, experiment_id: str, run_id: str) -> str:
    """Return the address of a run's page.

    Args:
        server: address of the server.
        experiment_id: id of its experiment.
        run_id: the run.

    >>> run_url("http://127.0.0.1:5000", "1", "ab")
    'http://127.0.0.1:5000/#/experiments/1/runs/ab?workflowType=machine_learning'
    """
    return _page(server, f"experiments/{quote(experiment_id, safe='')}/runs/{quote(run_id, safe='')}")


def comparison_url(server: str, run_ids: Sequence[str], experiment_ids: Sequence[str]) -> str:
    """Return the address of the page that compares runs.

    Args:
        server: address of the server.
        run_ids: the runs.
        experiment_ids: ids (not names) of their experiments.

    >>> comparison_url("http://127.0.0.1:5000/", ["a", "b"], ["1"])
    'http://127.0.0.1:5000/#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%221%22%5D&workflowType=machine_learning'
    """
    runs, experiments = (quote(json.dumps(list(ids), separators=(",", ":"))) for ids in (run_ids, experiment_ids))
    return _page(server, "compare-runs", f"runs={runs}", f"experiments={experiments}")


def sweep_url(server: str, run_ids: Sequence[str], experiment_id: str) -> str:
    """Return the address that shows the jobs of a sweep: their comparison; of too many, the table of the experiment.

    The page of the run above them is empty while it is collapsed, and it is so at first.

    Args:
        server: address of the server.
        run_ids: the jobs' runs.
        experiment_id: id of their experiment.

    >>> sweep_url("http://x", [], "1") == experiment_url("http://x", "1")
    True
    """
    if 0 < len(run_ids) <= MOST_COMPARED:
        return comparison_url(server, run_ids, [experiment_id])
    return experiment_url(server, experiment_id)


def _page(server: str, path: str, *query: str) -> str:
    return f"{server.rstrip('/')}/#/{path}?{'&'.join([*query, _WORKFLOW])}"
