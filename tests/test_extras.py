"""The callbacks need few packages beside torch and lightning; whatever needs more says how to install it."""

import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LIMIT_BYTES = 15e6

COMMAND = "from stabletrain.__main__ import main; main()"

SCRIPT = """
import warnings

from stabletrain import ScheduleLR, UserError, default_callbacks
from stabletrain.testing.toy import ToyBatches, ToyModule
from stabletrain.testing.trainer import quiet_trainer
from stabletrain.tracking import MLflowLogger
from stabletrain.tracking.store import ensure_store
from stabletrain.workloads.digits_data import DigitsData
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")
stack = default_callbacks(schedule="cosine", resume="exactly", checkpoints="save")
trainer = quiet_trainer(*stack, max_steps=4, default_root_dir="out")
trainer.fit(ToyModule(), DataLoader(ToyBatches(), batch_size=None))
print("applied", trainer.global_step)
for use in (
    lambda: MLflowLogger(),
    lambda: ensure_store("sqlite:///mlflow.db"),
    lambda: ScheduleLR("cosine").plot(steps=10),
    lambda: DigitsData(),
):
    try:
        use()
    except UserError as error:
        print(error)
"""


def requires() -> list[str]:
    """What this project requires without extras."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def needed(requires: Iterable[str] | None, found: set[str]) -> set[str]:
    """The distributions that are required without extras, directly or by another one."""
    for line in requires or []:
        requirement = Requirement(line)
        name = requirement.name.lower().replace("_", "-")
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            needed(distribution(name).requires, found)
    return found


def run(code: str, folder: Path, names: Iterable[str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has some of the installed distributions, and this project."""
    site = folder.with_name(f"{folder.name}-site")
    site.mkdir()
    for name in names:
        for top in {file.parts[0] for file in distribution(name).files or []} - {"..", "__pycache__"}:
            source = Path(str(distribution(name).locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    (site / "stabletrain-0.dist-info").mkdir(exist_ok=True)
    (site / "stabletrain-0.dist-info" / "entry_points.txt").write_text(
        "[stabletrain.plugins]\nstabletrain = stabletrain_plugins\n", encoding="utf-8"
    )
    path = os.pathsep.join(map(str, (site, ROOT, ROOT / "plugins")))
    command = [sys.executable, "-S", "-c", code, *words]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_callbacks_train_without_any_extra_and_each_other_use_names_its_pip_line(tmp_path: Path) -> None:
    """Bug: a module on the way of `default_callbacks` imports Hydra, MLflow, typer, pydantic or matplotlib."""
    done = run(SCRIPT, tmp_path, needed(requires(), set()))
    assert done.returncode == 0, done.stderr
    applied, logger, store, plot, digits = done.stdout.splitlines()
    assert applied == "applied 4"
    assert logger.endswith(
        'MLflowLogger needs the package mlflow, which is not installed: pip install "stabletrain[mlflow]"'
    )
    assert store.endswith('pip install "stabletrain[mlflow]"')
    assert plot.endswith(
        'ScheduleLR.plot needs the package matplotlib, which is not installed: pip install "stabletrain[plots]"'
    )
    assert digits.endswith(
        'data=digits needs the package sklearn, which is not installed: pip install "stabletrain[all]"'
    )


@pytest.mark.parametrize("words", [["--help"], ["train", "char_gpt"]], ids=" ".join)
def test_the_command_without_its_packages_is_one_line(tmp_path: Path, words: list[str]) -> None:
    """Bug: a traceback of typer's import."""
    done = run(COMMAND, tmp_path, needed(requires(), set()), *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("stabletrain: the command line needs the package ")
    assert done.stderr.endswith(': pip install "stabletrain[hydra]"\n')


def test_the_command_without_mlflow_says_so_and_starts_nothing(tmp_path: Path) -> None:
    """Bug: Hydra is installed, MLflow is not, and `train` ends in a traceback, or starts a worker first."""
    installed = {each.name for each in distributions() if not each.name.startswith(("mlflow", "stabletrain"))}
    done = run(COMMAND, tmp_path, installed, "train", "char_gpt", "trainer.max_steps=2")
    assert done.returncode == 2
    assert 'pip install "stabletrain[mlflow]"' in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def size(name: str) -> int:
    files = distribution(name).files or []
    return sum(path.stat().st_size for path in map(Path, map(str, (each.locate() for each in files))) if path.is_file())


def test_the_wheel_with_what_it_requires_is_small_and_has_no_tests(tmp_path: Path) -> None:
    """Bug: a heavy package is required by everybody (MLflow: 300 MB), or tests are installed with the code."""
    wheel = Path(next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        own = sum(each.file_size for each in archive.infolist())
    assert [name for name in names if Path(name).name.startswith("test_")] == []
    assert {
        "stabletrain/__init__.py",
        "stabletrain_plugins/rollback/callback.py",
        "stabletrain/conf/train.yaml",
    } <= set(names)
    new = needed(requires(), set()) - needed(["torch", "lightning"], set())
    assert own + sum(map(size, new)) < LIMIT_BYTES, f"{own} {sorted(new)}"
