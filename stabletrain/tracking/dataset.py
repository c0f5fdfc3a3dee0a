"""The data of a run, as MLflow shows them: a dataset with a digest, and tags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stabletrain.tracking.naming import shorten

_DIGEST = 36
"""Characters of a digest that MLflow's database holds."""
_NAME = 200


def data_tags(data: Mapping[str, Any]) -> dict[str, str]:
    """Return the tag ``data.digest``: the data module's own digest, or else ``first_batch:`` and a checksum.

    Args:
        data: the content of data.json.

    >>> data_tags({"fingerprint": None, "first_batch": "e1d2"})
    {'data.digest': 'first_batch:e1d2'}
    """
    if data["fingerprint"] is not None:
        return {"data.digest": data["fingerprint"]["digest"]}
    return {"data.digest": f"first_batch:{data['first_batch']}"} if data["first_batch"] else {}


def log_dataset(client: Any, run_id: str, data: Mapping[str, Any], name: str) -> None:
    """Log the training data of a run as a dataset with the first 12 characters of its digest.

    Args:
        client: of MLflow.
        run_id: the run.
        data: the content of data.json; without a digest and a first batch, nothing is logged.
        name: of the dataset, if the data module does not say one.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    fingerprint = data["fingerprint"]
    digest = fingerprint["digest"] if fingerprint is not None else data["first_batch"]
    if digest is None:
        return
    source = {"digest": digest, "digest_of": "data" if fingerprint is not None else "first batch"}
    found = Dataset(
        name=shorten(name if fingerprint is None else fingerprint["name"], _NAME),
        digest=digest[: 12 if len(digest) > _DIGEST else _DIGEST],
        source_type="code",
        source=json.dumps({"tags": source}),
    )
    client.log_inputs(run_id, [DatasetInput(found, [InputTag("mlflow.data.context", "training")])])
