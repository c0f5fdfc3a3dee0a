"""The pages that one wants to see first: those of given runs, and of the latest ones in a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stabletrain.tracking.addresses import MOST_COMPARED, experiment_url, run_url, sweep_url
from stabletrain.tracking.store import open_client
from stabletrain.tracking.store_errors import translate_errors

SWEEP = "stabletrain.sweep"
"""Tag of the run above the jobs of a sweep."""

_PARENT = "mlflow.parentRunId"


def latest_pages(uri: str, server: str) -> Iterator[tuple[str, str]]:
    """Yield a name and an address: the experiment of the latest run, and the jobs of the latest sweep in it.

    Args:
        uri: MLflow tracking URI of a store that `ensure_store` has made ready.
        server: address of its server.

    Raises:
        StoreError: if the store cannot be used.
    """
    with translate_errors(uri):
        client = open_client(uri)
        experiments = {each.experiment_id: each.name for each in client.search_experiments(max_results=1000)}
        newest = ["attributes.start_time DESC"]
        for run in client.search_runs(list(experiments), max_results=1, order_by=newest):
            experiment_id = run.info.experiment_id
            yield f"latest experiment, {experiments[experiment_id]}", experiment_url(server, experiment_id)
            newest = ["attributes.start_time DESC"]
            for sweep in client.search_runs(
                [experiment_id], f"tags.`{SWEEP}` = 'true'", max_results=1, order_by=newest
            ):
                query = f"tags.`{_PARENT}` = '{sweep.info.run_id}'"
                jobs = client.search_runs([experiment_id], query, max_results=MOST_COMPARED + 1)
                ids = [job.info.run_id for job in reversed(jobs)]
                yield f"latest sweep, {sweep.info.run_name}", sweep_url(server, ids, experiment_id)


def page_of_runs(uri: str, server: str, run_ids: Sequence[str]) -> str:
    """Return the address of a run's page, or of the page that compares several runs.

    Args:
        uri: MLflow tracking URI of a store that `ensure_store` has made ready.
        server: address of its server.
        run_ids: at least one; of a sweep.

    Raises:
        StoreError: if the store cannot be used.
    """
    with translate_errors(uri):
        experiment_id = str(open_client(uri).get_run(run_ids[0]).info.experiment_id)
    if len(run_ids) == 1:
        return run_url(server, experiment_id, run_ids[0])
    return sweep_url(server, run_ids, experiment_id)
