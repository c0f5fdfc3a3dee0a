"""From a run's folder to its landscape: what is computed, what is left out, what is refused."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import seed_everything

from stabletrain import SaveCheckpoints, UserError
from stabletrain.cli import landscape as command
from stabletrain.landscape.checkpoints import checkpoint_paths, read_checkpoints
from stabletrain.landscape.of_run import find, landscape_of
from stabletrain.landscape.pictures import clipping
from stabletrain.landscape.results import Landscape
from stabletrain.landscape.study import Options
from stabletrain.launch.bounded import write_json
from stabletrain.runtime.checkpoints import load
from stabletrain.testing.trainer import quiet_trainer
from stabletrain.workloads import DigitsCNN, DigitsData

STEPS = [3, 6, 9, 12]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with four checkpoints: BatchNorm, dropout, images shifted at random, Nesterov's momentum."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    model, data = {"width": 2, "lr": 0.1}, {"batch_size": 128}
    config = {
        "recipe": "digits", "seed": 0, "run_dir": str(folder), "resume": None, "optimizer": None,
        "model": {"_target_": "stabletrain.workloads.DigitsCNN", **model},
        "data": {"_target_": "stabletrain.workloads.DigitsData", **data},
        "trainer": {"max_steps": STEPS[-1], "max_epochs": None, "accelerator": "cpu"},
    }  # fmt: skip
    saver = SaveCheckpoints(folder / "checkpoints", every=3, keep_last=None)
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(saver, max_steps=STEPS[-1], limit_val_batches=0, default_root_dir=folder)
    trainer.fit(DigitsCNN(**model), datamodule=DigitsData(**data))
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, as on another machine."""
    return shutil.copytree(trained, tmp_path / "copied")


def landscape(folder: Path, **options: Any) -> tuple[Landscape, list[str]]:
    said: list[str] = []
    most = options.pop("most", 20)
    chosen = Options(**{"resolution": 3, "batches": 1, "has_curvature": False, **options})
    return landscape_of(find(str(folder)), chosen, said.append, most=most), said


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_with_several_checkpoints(run: Path) -> None:
    """Bugs: the loss of other weights or other statistics; a path that is not the run's; a run's folder that changes;
    random numbers drawn from the caller's generators; a cost that is not what was announced."""
    before, random = files(run), torch.get_rng_state()
    found, said = landscape(run, resolution=5, batches=2)
    assert files(run) == before
    assert torch.equal(random, torch.get_rng_state())
    assert [each.step for each in found.checkpoints] == STEPS
    assert found.random is not None
    assert found.path is not None
    assert found.shares is not None
    assert 0.5 < sum(found.shares) <= 1.0
    centre = found.centre
    assert found.random.losses[2][2] == centre.loss == centre.loss_in_plane
    assert centre.place == (0.0, 0.0)
    assert centre.loss < found.checkpoints[0].loss
    # buffers of the first checkpoint are its own at its loss, and the last one's in the plane
    assert found.checkpoints[0].loss_in_plane != found.checkpoints[0].loss
    for each in found.checkpoints:
        assert each.limit is not None
        assert each.limit.value == pytest.approx(2 * 1.9 / 2.8 / 0.1)
    assert found.passes == 2 * 25 * 2 + 2 * len(STEPS) * 2
    assert said[0].startswith(
        "forward passes: 5 x 5 points x 2 batches = 50 for the random plane, 58 for the plane of 4"
    )
    write_json(run / "landscape.json", found.as_json())
    assert json.loads((run / "landscape.json").read_text())["checkpoints"][-1]["loss"] == centre.loss


def test_curvature_at_a_checkpoint(run: Path) -> None:
    """Bugs: the Hessian of other weights; a count of products that is not that of the forward passes."""
    pytest.importorskip("scipy")
    found, _ = landscape(run, most=1, has_curvature=True)
    curvature = found.centre.curvature
    assert curvature is not None
    assert curvature.problem is None
    assert curvature.largest is not None
    assert curvature.smallest is not None
    assert curvature.largest > 1.0
    assert curvature.smallest < curvature.largest
    assert found.passes == 1 + 9 + curvature.products
    assert not found.by_differences


def test_losses_are_those_of_the_modules_own_step(run: Path) -> None:
    """Bugs: dropout, another precision, or the loss divided by an accumulation window."""
    whole = {"_target_": "stabletrain.workloads.DigitsData", "batch_size": 1437}
    with_node("data", whole)(run)
    with_node("model", {"_target_": "stabletrain.workloads.DigitsCNN", "width": 2, "max_shift": 0})(run)
    found, _ = landscape(run)
    assert found.batches == 1  # there are no more
    data = DigitsData(batch_size=1437)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    for each in found.checkpoints:
        module = DigitsCNN(width=2, max_shift=0).eval()
        module.load_state_dict(load(run / "checkpoints" / each.name)["state_dict"])
        with torch.no_grad():
            assert each.loss == pytest.approx(float(module.training_step(batch, 0)), rel=1e-5)


def test_it_is_the_same_again_and_another_seed_is_another_plane(run: Path) -> None:
    """Bug: other batches or directions each time, so that two pictures cannot be compared."""
    first, again, other = (landscape(run, seed=seed, most=1)[0] for seed in (0, 0, 1))
    assert first.as_json() == again.as_json()
    assert first.random != other.random
    assert first.centre == other.centre


def test_what_a_training_step_changes_is_put_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: a batch that training_step changes in place is another one at each evaluation; weights that
    on_load_checkpoint has renamed are not found; a loss that changes with each call is drawn without a word."""
    expected, _ = landscape(run, most=1)
    step = DigitsCNN.training_step
    calls: list[int] = []

    def changing(self: DigitsCNN, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        batch[0].zero_()
        return loss

    def counting(self: DigitsCNN, batch: Any, batch_idx: int) -> torch.Tensor:
        calls.append(batch_idx)
        return step(self, batch, batch_idx) * (1 + len(calls))

    def renaming(self: DigitsCNN, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"net.{name}": each for name, each in checkpoint["state_dict"].items()}

    monkeypatch.setattr(DigitsCNN, "training_step", changing)
    single_file(run, 15, lambda state: [state.update({name[4:]: state.pop(name)}) for name in list(state)])
    monkeypatch.setattr(DigitsCNN, "on_load_checkpoint", renaming, raising=False)
    found, _ = landscape(run, most=1)
    assert found.random == expected.random
    assert found.notes == expected.notes
    monkeypatch.setattr(DigitsCNN, "training_step", counting)
    assert landscape(run, most=1)[0].notes[-1].startswith("the loss is another one each time")


def test_a_training_step_that_takes_the_iterator_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a KeyError of ours."""
    monkeypatch.setattr(DigitsCNN, "training_step", lambda self, dataloader_iter: next(dataloader_iter))
    with pytest.raises(UserError, match=r"training_step of DigitsCNN takes the iterator over the loader"):
        landscape(run, most=1)


def test_batch_statistics(run: Path) -> None:
    """Bug: the option does not reach the module."""
    running, batch = (landscape(run, batch_stats=each, most=1)[0].centre.loss for each in (False, True))
    assert running != batch


def test_one_checkpoint_has_a_random_plane_only(run: Path) -> None:
    """Bug: a division by zero in the plane of one point."""
    found, _ = landscape(run, most=1)
    assert (found.random is not None, found.path, found.shares) == (True, None, None)
    (note,) = found.notes
    assert note.startswith("no plane of the checkpoints: there is one checkpoint; it takes three or more")
    found, said = landscape(run, most=3)
    assert [each.step for each in found.checkpoints] == [3, 9, 12]
    assert said[0] == "3 of the 4 checkpoints, evenly spaced; more with --checkpoints 4"


def single_file(run: Path, step: int, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """A file as Lightning's ModelCheckpoint writes it."""
    state = load(run / "checkpoints" / "step-00000012")["state_dict"]
    change(state)
    torch.save({"state_dict": state, "global_step": step}, run / "checkpoints" / f"step={step}.ckpt")


def test_checkpoints_that_cannot_be_used_are_left_out_and_named(run: Path) -> None:
    """Bugs: NaN weights as the centre of all planes; a damaged file that ends everything."""
    single_file(run, 15, lambda state: state["net.0.weight"].mul_(0.9))
    single_file(run, 18, lambda state: state["net.0.weight"].view(-1)[3:4].fill_(torch.nan))
    (run / "checkpoints" / "last.ckpt").symlink_to("step=15.ckpt")
    file = run / "checkpoints" / "step-00000006" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    found, _ = landscape(run)
    assert [each.step for each in found.checkpoints] == [3, 9, 12, 15]
    assert len(found.notes) == 2
    assert found.notes[1].startswith("step-00000006 is left out: ")
    assert found.notes[0] == "step=18.ckpt is left out: its weights are not finite (net.0.weight)"
    found, _ = landscape(run, most=2)
    assert [each.step for each in found.checkpoints] == [3, 15]  # and not the one that is evenly spaced before it


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_all_that_a_rollback_has_left_behind_is_not_on_the_path(run: Path) -> None:
    """Bug: the weights that a run went back from count as its end."""
    saver = SaveCheckpoints(run / "checkpoints", every=1, keep_last=None)
    trainer = quiet_trainer(saver, max_steps=7, limit_val_batches=0, default_root_dir=run)
    trainer.fit(DigitsCNN(width=2, lr=0.1), datamodule=DigitsData(128), ckpt_path=run / "checkpoints" / "step-00000006")
    assert [each.name for each in checkpoint_paths(run)] == ["step-00000003", "step-00000006", "step-00000007"]


def test_a_plane_in_which_the_loss_overflows(run: Path) -> None:
    """Bug: infinite losses end it, or are written as JSON that nobody reads."""
    single_file(run, 15, lambda state: state["net.13.weight"].mul_(2e38))
    found, _ = landscape(run, most=1)
    assert found.random is not None
    assert found.random.overflows
    assert clipping(found)
    write_json(run / "landscape.json", found.as_json())
    json.loads((run / "landscape.json").read_text(), parse_constant=pytest.fail)


def without_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def of_another_model(run: Path) -> None:
    single_file(run, 15, lambda state: state.pop("net.0.weight"))


def all_nan(run: Path) -> None:
    without_checkpoints(run)
    (run / "checkpoints").mkdir()
    state = {name: each * torch.nan for name, each in DigitsCNN(width=2).state_dict().items()}
    torch.save({"state_dict": state, "global_step": 1}, run / "checkpoints" / "a.ckpt")


def with_node(key: str, node: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        config = yaml.safe_load((run / "run.yaml").read_text())
        (run / "run.yaml").write_text(yaml.safe_dump({**config, key: node}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_checkpoints, r"has no checkpoint in checkpoints/.*plugins\.checkpoints\.keep_last=null"),
        (of_another_model, r"step=15\.ckpt is the checkpoint of another model.*Missing key.*net\.0\.weight"),
        (all_nan, r"none of the checkpoints.*a\.ckpt is left out: its weights are not finite"),
        (with_node("model", {"_target_": "os.system", "command": "true"}), r"model.*package 'os' is not trusted"),
        (with_node("model", None), r"model: .*lacks it"),
        (with_node("data", {"_target_": "stabletrain.workloads.DigitsData", "size": 1}), r"data\.size.*no argument"),
        (with_node("seed", "x"), r"seed: expected 0 to 2\*\*32 - 1, got 'x'"),
    ],
    ids=["none", "another", "nan", "untrusted", "incomplete", "argument", "seed"],
)
def test_what_cannot_be_drawn_is_one_message(run: Path, change: Callable[[Path], None], message: str) -> None:
    """Bugs: a traceback; a class of a stranger's config that is built."""
    change(run)
    with pytest.raises(UserError, match=message):
        landscape(run)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    """Bug: a traceback for a folder without run.yaml."""
    with pytest.raises(UserError, match=r"landscape: .* is not the folder of a run"):
        find(str(tmp_path))


@pytest.mark.slow
def test_divided_checkpoints_are_read_whole(tmp_path: Path) -> None:
    """Bug: the weights of one rank's shard alone."""
    import moving
    from rank_pool import on_ranks

    on_ranks(moving.save_each, 2, tmp_path, ["fsdp2"])
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "fsdp2-2").rename(folder / "checkpoints")
    problems: list[str] = []
    found = list(read_checkpoints(checkpoint_paths(folder), problems))
    assert len(found) >= 1
    assert problems == []
    for each in found:
        moving.Net("single").load_state_dict(each.content["state_dict"])


def test_what_a_package_is_missing_for_is_said_first(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bugs: an ImportError after all was computed; no pictures and nobody knows why; a table without the losses."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name in ("scipy", "matplotlib") else real(name, *of)
    )
    command.run(str(run), Options(resolution=3, batches=1), most=20, surface=True, trust=())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'no pictures: matplotlib is not installed: pip install "stabletrain[plots]"'
    assert lines[1] == 'no curvature: scipy is not installed: pip install "stabletrain[landscape]"'
    assert lines[-2:] == [f"numbers: {run / 'landscape' / 'landscape.json'}", "not logged to MLflow"]
    assert [path.name for path in (run / "landscape").iterdir()] == ["landscape.json"]
    found = json.loads((run / "landscape" / "landscape.json").read_text())["checkpoints"]
    rows = [line.split() for line in lines[lines.index("") :] if line.split()[:1] in [[str(step)] for step in STEPS]]
    assert [float(row[1]) for row in rows] == pytest.approx([each["loss"] for each in found], rel=1e-3)


@pytest.mark.slow
def test_pictures_are_among_the_runs_artifacts(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: the result is in the folder only; or the run's folder decides which store is written to."""
    pytest.importorskip("matplotlib")
    from stabletrain.tracking.store import ensure_store, open_client

    uri, other = (f"sqlite:///{tmp_path}/{name}.db" for name in ("mlflow", "other"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    ensure_store(uri)
    client = open_client(uri)
    run_id = client.create_run("0").info.run_id
    options = Options(resolution=3, batches=1, has_curvature=False)
    with_node("logger", {"tracking_uri": other, "run_id": run_id})(run)
    command.run(str(run), options, most=20, surface=True, trust=())
    assert f"not logged to MLflow: its store is {other}" in capsys.readouterr().out
    with_node("logger", {"tracking_uri": uri, "run_id": run_id})(run)
    command.run(str(run), options, most=20, surface=True, trust=())
    assert f"logged to MLflow: landscape/ of the run {run_id}" in capsys.readouterr().out
    names = {each.path for each in client.list_artifacts(run_id, "landscape")}
    assert names == {f"landscape/{name}" for name in ("landscape.json", "planes.png", "surfaces.png")}
