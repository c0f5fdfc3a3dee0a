"""Imports go one way, the core names no plugin, and looking something up loads nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE, RUNTIME = ROOT / "stabletrain" / "core", ROOT / "stabletrain" / "runtime"
PLUGINS = ROOT / "plugins" / "stabletrain_plugins"
FOLDERS = sorted(p.name for p in PLUGINS.iterdir() if (p / "conf").is_dir())
PURE = {"stabletrain.core", "stabletrain.errors"}


def code(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*.py")) if not p.name.startswith("test_")]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def below(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def is_pure(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names or below(name, PURE)


@pytest.mark.parametrize("path", [*code(CORE), *PLUGINS.glob("*/rule.py")], ids=lambda p: f"{p.parent.name}/{p.name}")
def test_core_and_rules_import_the_standard_library_only(path: Path) -> None:
    """Bug: a rule that needs torch cannot be replayed in microseconds, nor read without it."""
    assert not [name for name in imports(path) if not is_pure(name)]


LAYERS = ["core", "runtime", "tracking config", "launch", "cli"]


@pytest.mark.parametrize("level", range(len(LAYERS)), ids=LAYERS)
def test_imports_go_one_way(level: int) -> None:
    """Bug: a cycle between layers, by which nothing can be used or tested alone."""
    above = {f"stabletrain.{name}" for layer in LAYERS[level + 1 :] for name in layer.split()} | {"stabletrain.worker"}
    for name in LAYERS[level].split():
        place = ROOT / "stabletrain" / name
        for path in code(place) if place.is_dir() else [place.with_suffix(".py")]:
            wrong = [each for each in imports(path) if below(each, above)]
            if name == "cli":
                wrong = []
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("folder", [CORE, RUNTIME], ids=lambda p: p.name)
def test_core_and_runtime_know_no_hydra_and_no_mlflow(folder: Path) -> None:
    """Bug: a Lightning script that needs the configuration's or the tracking's packages."""
    for path in code(folder):
        assert not [n for n in imports(path) if below(n, {"hydra", "omegaconf", "mlflow", "stabletrain_plugins"})], path


@pytest.mark.parametrize("folder", FOLDERS)
def test_plugins_do_not_know_each_other(folder: str) -> None:
    """Bug: a plugin that cannot be removed without breaking another."""
    for path in code(PLUGINS / folder):
        others = [n for n in imports(path) if below(n, {"stabletrain_plugins"})]
        assert all(below(n, {f"stabletrain_plugins.{folder}"}) for n in others), f"{path}: {others}"


def test_core_and_runtime_name_no_plugin() -> None:
    """Bug: a special case for one plugin in what serves all of them. Docstrings and messages may give examples."""
    plugins = {name for name in FOLDERS if "_" in name}  # a single word, as "rollback", is also a kind of event
    for path in [*code(CORE), *code(RUNTIME)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in plugins, f"{path}: {node.value}"
            elif isinstance(node, ast.Name | ast.Attribute):
                name = node.id if isinstance(node, ast.Name) else node.attr
                assert name not in plugins, f"{path}: {name}"


@pytest.mark.parametrize("statement", ["import stabletrain", "import stabletrain.config.discovery"])
def test_looking_things_up_is_light(statement: str) -> None:
    """Bug: an import that makes `--help`, `ls` and completion take seconds."""
    heavy = ["torch", "lightning", "mlflow", "hydra", "numpy", "matplotlib"]
    script = f"{statement}\nimport sys\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_public_name_exists() -> None:
    """Bug: a name in the table of exports that leads nowhere."""
    import stabletrain

    for name in stabletrain.__all__:
        assert getattr(stabletrain, name) is getattr(stabletrain, name)
        assert name in dir(stabletrain)
