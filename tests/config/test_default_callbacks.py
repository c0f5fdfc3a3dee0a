"""What `default_callbacks` takes for a slot, at run time and for a type checker; and plugins that are given twice."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import fits
import pytest
from fits import HEALTHY, Net, batches, fit
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from torch.utils.data import DataLoader

import stabletrain as st
from stabletrain import default_callbacks
from stabletrain.errors import UserError

TYPED = """
from stabletrain import ClipNorm, ClipValue, ClipZScore, ScheduleLR, default_callbacks

default_callbacks()
default_callbacks(clip=ClipNorm(0.5), spike=None, outliers="none", schedule="cosine")
default_callbacks(clip="nrom")  # wrong
default_callbacks(clpi="norm")  # wrong
ClipNorm(max_nrom=1)  # wrong
ClipNorm(max_norm="1")  # wrong
ClipValue(max_vlaue=1)  # wrong
ClipZScore.zclip(z=1)  # wrong
ScheduleLR(kind="cosin")  # wrong
"""


def test_instances_none_and_names() -> None:
    """Bug: only names are taken; or a slot that is given is also filled by default."""
    clip = st.ClipNorm(0.5)
    made = default_callbacks(clip=clip, spike=None, outliers="none", gradients=st.MonitorGradients(every=3))
    assert made[0] is clip
    assert [type(each).__name__ for each in made] == ["ClipNorm", "SkipNonFinite", "MonitorGradients"]
    assert [each.chosen_by_default for each in made] == [False, True, False]
    assert isinstance(default_callbacks(schedule=st.ScheduleLR("cosine"))[0], st.ScheduleLR)
    preset, *_ = default_callbacks(clip=st.ClipZScore.zclip())
    assert preset.target == "reciprocal"


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"clip": st.SkipNonFinite()}, ["clip: expected a plugin of this slot", "nonfinite=SkipNonFinite(...)"]),
        ({"clip": st.MonitorGradients()}, ["got MonitorGradients of the slot gradients"]),
        ({"spike": st.ScheduleLR("cosine")}, ["schedule=ScheduleLR(...)"]),
        ({"clip": Timer()}, ["got Timer, which belongs to no slot", "[*default_callbacks(), Timer(...)]"]),
        ({"clip": st.ClipNorm}, ["got the class ClipNorm; call it"]),
        ({"clip": 0.5}, ["'zscore', a callback, or None; got 0.5"]),
        ({"clip": False}, ["got False"]),
        ({"clip": "nrom"}, ["clip has no option 'nrom'; did you mean 'norm'"]),
        ({"clpi": None}, ["there is no slot 'clpi'; did you mean 'clip'"]),
    ],
)
def test_a_wrong_choice_is_one_message(choices: dict[str, object], words: list[str]) -> None:
    """Bug: a plugin in another slot's place, so that a fault is unguarded; or an error that does not say where to."""
    with pytest.raises(UserError) as error:
        default_callbacks(**choices)
    for word in words:
        assert word in str(error.value)


def test_a_third_partys_option_and_slot(tmp_path: Path) -> None:
    """Bug: at run time only the options are taken that the signature names."""
    package = tmp_path / "their_plugins"
    for option in ("plugins/clip/theirs", "plugins/mood/good"):
        file = package / "clip_theirs" / "conf" / f"{option}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("_target_: their_plugins.clip_theirs.Theirs\n")
    (package / "__init__.py").touch()
    (package / "clip_theirs" / "__init__.py").write_text(
        "from lightning.pytorch import Callback\nclass Theirs(Callback): ...\n"
    )
    info = tmp_path / "their_plugins-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugins\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[stabletrain.plugins]\ntheirs = their_plugins\n")
    code = (
        "import stabletrain as st\nfrom their_plugins.clip_theirs import Theirs\n"
        "print([type(each).__name__ for each in st.default_callbacks(clip='theirs', mood='good', spike=None)])\n"
        "print(type(st.default_callbacks(clip=Theirs())[0]).__name__)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "['Theirs', 'SkipNonFinite', 'SkipOutliers', 'MonitorGradients', 'Theirs']" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "Theirs", done.stderr


@pytest.mark.slow
def test_a_type_checker_finds_wrong_names(tmp_path: Path) -> None:
    """Bug: the constructors' and default_callbacks' arguments are Any for mypy and the IDE."""
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(TYPED)
    root = Path(st.__file__).parents[1]  # where `make lint` leaves its cache, without which torch is read again
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", root / "pyproject.toml", script],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    wrong = [number for number, line in enumerate(TYPED.splitlines(), 1) if line.endswith("# wrong")]
    found = [int(line) for line in re.findall(r"script.py:(\d+): error", done.stdout)]
    assert found == wrong, done.stdout + done.stderr


def test_the_signature_is_true() -> None:
    """Bug: a slot or default in the generated signature that default_callbacks does not have."""
    source = Path(st.__file__).read_text(encoding="utf-8").partition("def default_callbacks(")[2]
    slots = dict(re.findall(r"        (\w+): _\w+ \| Callback \| None = (\S+),\n", source))
    assert {"clip", "nonfinite", "outliers", "spike", "schedule", "gradients", "checkpoints", "resume"} <= set(slots)
    defaults = {name: value.strip('"') for name, value in slots.items()}
    assert list(map(type, default_callbacks(**defaults))) == list(map(type, default_callbacks()))


TWICE = {
    "of one slot": (
        lambda: [*default_callbacks(), st.ClipNorm()],
        ["ClipZScore for the slot clip", "clip=ClipNorm(...)"],
    ),
    "a detector": (lambda: [*default_callbacks(), st.DetectSpikes()], ["Rollback for the slot spike"]),
    "the same": (lambda: [*default_callbacks(), st.ClipZScore()], ["ClipZScore is given twice", "clip=ClipZScore("]),
    "the monitor": (lambda: [st.MonitorGradients(), *default_callbacks()], ["MonitorGradients is given twice"]),
    "the whole stack": (lambda: default_callbacks() + default_callbacks(), ["ClipZScore is given twice"]),
    "two by hand": (lambda: [st.ClipValue(), st.ClipValue()], ["ClipValue is given twice", 'name="second"']),
    "two guards": (lambda: [st.Guard(), st.Guard()], ["Guard is given twice; remove one"]),
}


@pytest.mark.parametrize("case", TWICE)
def test_given_twice_is_one_message(case: str, tmp_path: Path) -> None:
    """Bug: two clippers where one was meant, without a word; or Lightning's message about state keys."""
    make, words = TWICE[case]
    with pytest.raises(UserError) as error:
        fit(Net(), batches(HEALTHY), *make(), default_root_dir=tmp_path)
    for word in words:
        assert word in str(error.value)


def test_two_that_are_meant(tmp_path: Path) -> None:
    """Bug: a chosen pair of one slot is refused, or a key in a checkpoint is no plain str."""
    stack: list[Callback] = [*default_callbacks(clip=st.ClipZScore()), st.ClipNorm(), st.ClipNorm(name="tight")]
    quiet = fits.trainer(*stack, default_root_dir=tmp_path)
    quiet.validate(Net(), DataLoader(batches(HEALTHY), batch_size=None), verbose=False)
    for trainer in (quiet, fit(Net(), batches(HEALTHY), *stack, default_root_dir=tmp_path)):
        states = trainer._checkpoint_connector.dump_checkpoint()["callbacks"]
        assert {"clip_zscore", "clip_norm", "tight"} <= set(states)
        assert {type(key) for key in states} == {str}
    assert inspect.signature(st.ClipNorm).parameters["max_norm"].default == 1.0
