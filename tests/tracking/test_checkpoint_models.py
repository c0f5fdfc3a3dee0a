"""Checkpoints as logged models: those that are kept, and no others."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from stabletrain.tracking.checkpoint_models import sync_models
from stabletrain.tracking.runs import create_run


def verified(folder: Path, step: int) -> Path:
    path = folder / "checkpoints" / f"step-{step:08}"
    path.mkdir(parents=True)
    (path / "manifest.json").touch()
    return path


def models(client: Any, run_id: str) -> dict[str, Any]:
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    return {each.tags["path"]: each for each in found}


def test_kept_checkpoints_are_listed(uri: str, client: Any, tmp_path: Path) -> None:
    """Bugs: a checkpoint that is still written, or a link to one, is listed; one that was deleted stays; a second call
    lists all of them again; names that MLflow refuses; the models of another run or folder, or of the user, are
    deleted; outputs that point to deleted models."""
    folder, run_id = tmp_path / "run", create_run(uri, "demo")
    other = create_run(uri, "demo")
    first, second = verified(folder, 100), verified(folder, 200)
    sync_models(uri, other, folder)
    (folder / "checkpoints" / "step-00000300").mkdir()
    odd = folder / "checkpoints" / "epoch=0-step=7.v1 'x'.ckpt"
    odd.touch()
    (folder / "checkpoints" / "last.ckpt").symlink_to(odd)
    mine = client.create_logged_model(client.get_run(run_id).info.experiment_id, "mine", run_id, {"path": "/elsewhere"})
    sync_models(uri, run_id, folder)
    found = models(client, run_id)
    assert found.keys() == {str(first), str(second), str(odd), "/elsewhere"}
    assert {str(found[str(path)].status) for path in (first, second, odd)} == {"READY"}
    assert found[str(odd)].name == "epoch=0-step=7-v1 -x--ckpt"
    assert found[str(first)].tags["step"] == "100"
    assert not client.get_run(run_id).outputs.model_outputs

    shutil.rmtree(first)
    third = verified(folder, 400)
    for _ in range(2):
        sync_models(uri, run_id, folder, link=True)
    found = models(client, run_id)
    assert found.keys() == {str(second), str(third), str(odd), "/elsewhere"}
    outputs = {each.model_id: each.step for each in client.get_run(run_id).outputs.model_outputs}
    assert outputs == {found[str(path)].model_id: step for path, step in ((second, 200), (third, 400), (odd, 7))}
    assert len(models(client, other)) == 2

    sync_models(uri, run_id, tmp_path / "a resumed run's folder", link=True)  # it has no checkpoint yet
    assert len(models(client, run_id)) == 4
    assert client.get_logged_model(mine.model_id).name == "mine"


@pytest.mark.parametrize("nothing", ["no folder", "a file"])
def test_a_folder_without_checkpoints(uri: str, client: Any, tmp_path: Path, nothing: str) -> None:
    """Bug: a run that saves no checkpoint has an error at its end."""
    run_id = create_run(uri, "demo")
    if nothing == "a file":
        (tmp_path / "checkpoints").touch()
    sync_models(uri, run_id, tmp_path, link=True)
    assert models(client, run_id) == {}
