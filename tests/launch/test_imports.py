"""How a process of ours imports large packages, and what that leaves alone."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule
from processes import environment

from stabletrain.launch.imports import collect_before_exit, importing


class Node:
    """An object that only a collection frees: it refers to itself."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_imported_is_left_out_of_collections_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bugs: a collector that stays switched off, so that the user's cycles fill the memory; one that looks through the
    modules all the same; the user's objects left out, as the module is imported already.
    """
    (tmp_path / "imported_once.py").write_text(
        "import gc\ncollects = gc.isenabled()\nmany = [[] for _ in range(1000)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.get_freeze_count()
    with importing("imported_once"):
        import imported_once  # type: ignore[import-not-found]
    assert gc.isenabled()
    assert not imported_once.collects
    kept = gc.get_freeze_count()
    assert kept >= before + 1000
    node = weakref.ref(Node())
    with importing("imported_once"):
        assert gc.isenabled()
    assert gc.get_freeze_count() <= kept
    gc.collect()
    assert node() is None
    monkeypatch.delitem(sys.modules, "imported_once")


def test_an_import_that_fails_leaves_the_collector_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: no collection any more after a broken package; a collector that somebody has switched off is on; in a sweep
    without matplotlib, whatever is garbage at each attempt to import it stays in memory.
    """
    kept = gc.get_freeze_count()
    with pytest.raises(ModuleNotFoundError), importing("there_is_none"):
        __import__("there_is_none")
    assert gc.isenabled()
    assert gc.get_freeze_count() <= kept
    gc.disable()
    try:
        with importing("there_is_none"):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_launcher_imports_neither_torch_nor_lightning() -> None:
    """Bug: torch is imported twice for each run, once by the process that only waits for the other one."""
    script = (
        "import sys, stabletrain.cli.main, stabletrain.cli.starting, stabletrain.cli.summary\n"
        "import stabletrain.launch.launcher, stabletrain.tracking.artifacts, stabletrain.tracking.checkpoint_models\n"
        "import stabletrain.tracking.picture, stabletrain.tracking.runs, stabletrain.tracking.store\n"
        "print([name for name in ('torch', 'lightning', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_module_that_something_holds_is_left_to_pythons_end() -> None:
    """Bug: what holds the user's module is left out of collections, and so is never destroyed, nor is the module."""
    gc.collect()
    gc.freeze()
    node = weakref.ref(Node())
    collect_before_exit()
    assert node() is None
    assert gc.get_freeze_count()
    module = LightningModule()
    collect_before_exit()
    assert not gc.get_freeze_count()
    del module


def test_a_file_of_a_module_that_something_holds_is_closed(tmp_path: Path) -> None:
    """Bug: ``Optional`` of a class of the user's, whose methods hold their module's variables, is in a cache that is
    left out of collections, and what was written to an open file is lost.
    """
    (tmp_path / "users.py").write_text(
        "import sys\nfrom typing import Optional\n\n\n"
        "class Mine:\n    def use(self): pass\n\n\n"
        "def call(mine: Optional[Mine]): pass\n\n\n"
        "file = open(sys.argv[1], 'w')\nfile.write('written')\n"
    )
    script = (
        "import gc\nfrom stabletrain.launch.imports import collect_before_exit\n"
        "gc.freeze()\nimport users\ndel users\ncollect_before_exit()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "out.txt")]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=60)
    assert (tmp_path / "out.txt").read_text() == "written", done.stderr
