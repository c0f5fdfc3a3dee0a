import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest

TINY = str(Path(__file__).parent / "tiny.yaml")


class Cli(processes.Cli):
    """The command line, with the recipe ``tiny`` and what its runs have left in the folder and in MLflow."""

    def tiny(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return self("train", TINY, "--trust", "tiny_workload", *words)

    def results(self, recipe: str = "tiny") -> list[dict[str, Any]]:
        files = sorted((self.folder / "runs" / recipe).glob("*/result.json"))
        return [json.loads(file.read_text()) for file in files]

    def runs(self) -> list[Any]:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        ids = [experiment.experiment_id for experiment in client.search_experiments()]
        return list(client.search_runs(ids))

    def artifacts(self, run: Any = None) -> set[str]:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        if run is None:
            (run,) = self.runs()
        return {each.path for each in client.list_artifacts(run.info.run_id)}


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


Make = Callable[..., dict[str, Any]]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A run.yaml's content."""
    return {
        "recipe": "tiny",
        "seed": 0,
        "run_dir": str(tmp_path / "run"),
        "resume": None,
        "model": {"_target_": "tiny_workload.TinyModel"},
        "data": {"_target_": "tiny_workload.TinyData"},
        "optimizer": None,
        "schedule": None,
        "plugins": {},
        "callbacks": {},
        "precision": {"precision": "32-true"},
        "strategy": {"strategy": "auto"},
        "trainer": {"max_steps": 3, "accelerator": "cpu", "devices": 1},
        "logger": None,
        "launch": {"kind": "local", "processes": 1, "nodes": 1, "threads": 1},
        "trust": [],
        "choices": {},
    }
