"""A rule imports the standard library and the core alone; importing a plugin's package loads no heavy library."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator

from stabletrain.testing.failure import wrong
from stabletrain.testing.subject import Subject

HEAVY = ("torch", "lightning", "mlflow", "hydra", "numpy", "matplotlib", "bitsandbytes")

_ALLOWED = ("stabletrain.core", "stabletrain.errors", "stabletrain.settings")


def rule_is_pure(subject: Subject) -> None:
    """rule.py imports only the standard library, ``stabletrain.core`` and ``stabletrain.errors``, also in functions."""
    file = subject.plugin.folder / "rule.py"
    for line, module in _imports(ast.parse(file.read_text(encoding="utf-8"))):
        allowed = any(module == each or module.startswith(f"{each}.") for each in _ALLOWED)
        if not allowed and module.split(".")[0] not in sys.stdlib_module_names:
            wrong(
                "rule.py to import only the standard library, stabletrain.core and stabletrain.errors",
                f"{module!r} in {file}:{line}",
            )


def import_is_light(subject: Subject) -> None:
    """Importing the package (and its rule) in a new process loads none of the heavy libraries."""
    modules = [subject.plugin.package]
    if subject.plugin.kind == "rule":
        modules.append(f"{subject.plugin.package}.rule")
    code = (
        f"import sys, {', '.join(modules)}; "
        f"print(*sorted({set(HEAVY)!r} & {{name.split('.')[0] for name in sys.modules}}))"
    )
    path = os.pathsep.join(each for each in sys.path if each)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        wrong(f"{' and '.join(modules)} to be importable", done.stderr.strip().splitlines()[-1])
    if loaded := done.stdout.strip():
        wrong(f"importing {' and '.join(modules)} to load no heavy library", loaded)


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
