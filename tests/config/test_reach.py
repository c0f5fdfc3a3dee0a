"""A walk over all that a config can name in the built-in packages: what is accepted, and what building it does."""

import contextlib
import io
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reach import accepted, callables, places, report

SNAPSHOT = Path(__file__).with_name("accepted_classes.txt")
PRESETS = {"stabletrain.ClipZScore.zclip", "stabletrain.SkipOutliers.olmo"}
EVENTS = (
    "ctypes.dlopen", "os.chdir", "os.exec", "os.fork", "os.kill", "os.mkdir", "os.posix_spawn", "os.putenv",
    "os.remove", "os.rename", "os.system", "shutil.rmtree", "socket.bind", "socket.connect", "socket.getaddrinfo",
    "subprocess.Popen",
)  # fmt: skip

Found = dict[type, dict[str, Any]]


@pytest.fixture(scope="module")
def found() -> Found:
    return accepted(places(), callables())


@pytest.mark.slow
def test_nothing_new_is_accepted_unseen(found: Found) -> None:
    # a class that a new release adds may write, connect or start something when it is built: somebody has to look
    known, base = set(), ""
    for line in SNAPSHOT.read_text().splitlines():
        if not line.startswith(" "):
            base = line
        known.add((base, line.strip()))
    new, base = [], ""
    for line in report(found).splitlines():
        if not line.startswith(" "):
            base = line
        if (base, line.strip()) not in known:
            new.append(f"{base}: {line.strip()}")
    assert not new, (
        f"read their constructors; then add their modules to EFFECTS in config/trust.py, or accept them with "
        f"`python tests/helpers/reach.py > {SNAPSHOT.name}`:\n" + "\n".join(new)
    )


@pytest.mark.slow
def test_no_function_is_accepted(found: Found) -> None:
    """Bug: one of the thousands of functions in the built-in packages, or a method of an accepted class, is called."""
    made = {name: each for names in found.values() for name, each in names.items()}
    assert len(made) > 500  # otherwise the walk has missed the packages
    assert {name for name, each in made.items() if not isinstance(each, type)} == PRESETS
    for base, names in found.items():
        for name, each in names.items():
            assert base in (each if isinstance(each, type) else each.__self__).__mro__, name


@pytest.fixture(scope="module")
def effects() -> Iterator[list[str]]:
    """What the code that runs does beyond this process's memory; an audit hook cannot be removed, only silenced."""
    seen: list[str] = []
    active = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and any(letter in str(arguments[1]) for letter in "wax+")
        if active[0] and (event in EVENTS or (writes and "__pycache__" not in str(arguments[0]))):
            seen.append(f"{event} {arguments}")

    sys.addaudithook(hook)
    yield seen
    active[0] = False


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_building_has_no_effect(
    found: Found, effects: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a class of the right kind that writes, connects or starts something in its constructor."""
    monkeypatch.chdir(tmp_path)
    wrong, built = [], 0
    for name, target in {name: each for names in found.values() for name, each in names.items()}.items():
        if name == "lightning.pytorch.profilers.XLAProfiler":  # its __del__ raises where there is no TPU
            continue
        effects.clear()
        threads = threading.active_count()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                target()
                built += 1
            except BaseException:  # it needs arguments, or a package or device that is not here
                pass
        if effects or threading.active_count() > threads:
            wrong.append(f"{name}: {effects or 'a thread'}")
    assert built > 300
    assert not wrong, "\n".join(wrong)
    assert not list(tmp_path.iterdir())
