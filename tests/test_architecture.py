"""Imports go one way, nothing imports in circles, the core names no plugin, and looking something up loads nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGINS = ROOT / "plugins" / "stabletrain_plugins"
FOLDERS = sorted(p.name for p in PLUGINS.iterdir() if (p / "conf").is_dir())

LAYERS = [
    ["settings"],
    ["errors", "version", "paths", "lazy", "safe_path", "terminal"],
    ["core", "extras"],
    ["runtime.internals"],
    ["runtime"],  # the modules directly in it
    ["optim"],
    ["runtime.records", "runtime.data", "runtime.hidden", "runtime.observing"],
    ["runtime.guard"],
    ["runtime.snapshots", "runtime.windows"],
    ["runtime.checkpoints"],
    ["strategies"],
    ["planning", "checkup"],
    ["tracking", "config"],
    ["workloads", "chaos"],
    ["launch"],
    ["landscape"],
    ["testing"],
    ["cli"],
    ["worker", "__main__"],
]
"""Rooms of the package, lowest first; a room imports itself and those in layers below it."""

PURE = {"stabletrain.core", "stabletrain.errors", "stabletrain.settings"}
ALLOWED_TO_PLUGINS = {*PURE, "stabletrain.extras", "stabletrain.runtime", "stabletrain.optim"}


def code(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*.py")) if not p.name.startswith("test_")]


def module_name(path: Path) -> str:
    below = ROOT / "plugins" if path.is_relative_to(ROOT / "plugins") else ROOT
    return ".".join(path.relative_to(below).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in [*code(ROOT / "stabletrain"), *code(PLUGINS)]}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere: also within functions, and for type checkers only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def below(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def room(module: str) -> str:
    """The room of a module of the package: ``core``, ``runtime.guard``, ``runtime`` for what lies directly in it."""
    parts = module.split(".")[1:]
    if parts[:1] == ["runtime"] and (ROOT / "stabletrain" / "runtime" / "/".join(parts[1:2])).is_dir():
        return ".".join(parts[:2])
    return parts[0] if parts else ""


@pytest.mark.parametrize(
    "path",
    [*code(ROOT / "stabletrain" / "core"), *PLUGINS.glob("*/rule.py")],
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_core_and_rules_import_the_standard_library_only(path: Path) -> None:
    """Bug: a rule that needs torch cannot be replayed in microseconds, nor read without it."""
    assert not [n for n in imports(path) if n.partition(".")[0] not in sys.stdlib_module_names and not below(n, PURE)]


def test_imports_go_one_way() -> None:
    """Bugs: rooms that need each other, so that none can be used or tested alone; a new folder that nobody placed."""
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    wrong = []
    for module, path in MODULES.items():
        if not module.startswith("stabletrain.") or module == "stabletrain.runtime":
            continue
        mine = room(module)
        assert mine in level, f"{module}: give its room a place in LAYERS"
        for name in imports(path):
            theirs = room(name) if name.startswith("stabletrain.") else mine
            upwards = theirs != mine and level[theirs] >= level[mine]
            exports = name == "stabletrain" and mine != "testing"
            if upwards or exports or name.startswith("stabletrain_plugins"):
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that import each other, directly or not."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for name in graph[left.pop()] - seen:
                seen.add(name)
                left.append(name)
        return seen

    reach = {name: reachable(name) for name in graph}
    found: list[set[str]] = []
    for name in graph:
        group = {other for other in reach[name] if name in reach[other]}
        if group and group not in found:
            found.append(group)
    return found


def test_nothing_imports_in_circles() -> None:
    """Bug: files that can only be understood, moved and tested together."""
    graph = {
        module: {name for name in imports(path) if name in MODULES and name != module}
        for module, path in MODULES.items()
        if module != "stabletrain"  # its table of exports names what is above it, for type checkers
    }
    assert all(name in graph for names in graph.values() for name in names - {"stabletrain"})
    assert circles({module: names - {"stabletrain"} for module, names in graph.items()}) == []


def test_a_circle_would_be_found() -> None:
    """Bug: a search that finds nothing, and so proves nothing."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]


def test_core_and_runtime_know_no_hydra_and_no_mlflow() -> None:
    """Bug: a Lightning script that needs the configuration's or the tracking's packages."""
    for path in [*code(ROOT / "stabletrain" / "core"), *code(ROOT / "stabletrain" / "runtime")]:
        assert not [n for n in imports(path) if below(n, {"hydra", "omegaconf", "mlflow", "stabletrain_plugins"})], path


@pytest.mark.parametrize("folder", FOLDERS)
def test_plugins_do_not_know_each_other(folder: str) -> None:
    """Bugs: a plugin that cannot be removed without breaking another; one that needs the launcher or the config."""
    for path in code(PLUGINS / folder):
        ours = [n for n in imports(path) if below(n, {"stabletrain", "stabletrain_plugins"})]
        assert all(below(n, {f"stabletrain_plugins.{folder}", *ALLOWED_TO_PLUGINS}) for n in ours), f"{path}: {ours}"


def test_core_and_runtime_name_no_plugin() -> None:
    """Bugs: a special case for one plugin in what serves all of them; a message in the name of one."""
    plugins = {name for name in FOLDERS if "_" in name}  # a single word, as "rollback", is also a kind of event
    for path in [*code(ROOT / "stabletrain" / "core"), *code(ROOT / "stabletrain" / "runtime")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in plugins, f"{path}: {node.value}"
                assert not node.value.startswith(tuple(f"{name}: " for name in FOLDERS)), f"{path}: {node.value}"
            elif isinstance(node, ast.Name | ast.Attribute):
                name = node.id if isinstance(node, ast.Name) else node.attr
                assert name not in plugins, f"{path}: {name}"


def test_few_files_lie_beside_the_rooms_of_the_runtime() -> None:
    """Bug: one level of many files, in which nobody finds the one to change."""
    assert len([p for p in (ROOT / "stabletrain" / "runtime").glob("*.py") if p.name != "__init__.py"]) <= 8


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


LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
OWN_TRAINER = {"config", "landscape", "launch", "planning", "workloads"}
"""Rooms whose Trainer is that of a recipe, which the launcher makes: it is always lightning.pytorch's."""
BOTH_PACKAGES = {"stabletrain.runtime.internals.packages", "stabletrain.testing.toy"}
"""Modules that have a class for each package."""
OF_CONFIGS = {"stabletrain.runtime.windows.counted_throughput"}
"""Modules with callbacks for configs alone, whose Trainer is lightning.pytorch's."""
WORKS_FOR_BOTH = {
    "migrate_checkpoint", "is_param_in_hook_signature", "rank_zero_experiment",
    "_materialize_distributed_module", "_METADATA_FILENAME", "get_available_flops",
}  # fmt: skip
"""Functions of Lightning that look at no class."""


def uses_of_lightning(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines and names of uses of Lightning's objects that run, except in ``both(...)`` and ``own(...)``."""
    names: set[str] = set()
    allowed: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if below(alias.name, LIGHTNING):
                    names.add(alias.asname or alias.name.partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and below(node.module or "", LIGHTNING):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("both", "own", "cast"):
            allowed |= {id(part) for part in ast.walk(node.args[0])}
        for field in ("annotation", "returns"):
            if (annotation := getattr(node, field, None)) is not None:
                allowed |= {id(part) for part in ast.walk(annotation)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names - WORKS_FOR_BOTH and id(node) not in allowed:
            yield node.lineno, node.id


def test_lightnings_classes_are_compared_in_one_place() -> None:
    """Bug: an ``isinstance``, ``except`` or base class that fails silently under Lightning's other name.

    Annotations do not run. All other uses go through stabletrain.runtime.internals.packages.
    """
    wrong = []
    for module, path in MODULES.items():
        if room(module) in OWN_TRAINER or module in BOTH_PACKAGES | OF_CONFIGS:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        wrong += [f"{path.relative_to(ROOT)}:{line}: {name}" for line, name in uses_of_lightning(tree)]
    assert not wrong, "use both(), own() or a base class of runtime/internals/packages.py:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "use",
    [
        "isinstance(x, Timer)",
        "issubclass(x, (int, Timer))",
        "type(x) is Timer",
        "x.fn == Timer.FITTING",
        "class Mine(Timer): ...",
        "ERRORS = (ValueError, Timer)",
        "try: f()\nexcept Timer: ...",
        "match x:\n    case Timer(): ...",
        "Timer.setup(x)",
        "isinstance(both(int), Timer)",
    ],
)
def test_a_comparison_with_one_package_would_be_found(use: str) -> None:
    """Bug: a search that finds nothing, and so proves nothing."""
    tree = ast.parse(f"from lightning.pytorch.callbacks import Timer\ndef f(x: Timer) -> Timer: ...\n{use}")
    assert [name for _, name in uses_of_lightning(tree)] == ["Timer"]
    assert not list(uses_of_lightning(ast.parse("import lightning as L\nisinstance(x, both(L.Trainer))")))
