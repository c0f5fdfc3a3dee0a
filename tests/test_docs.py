"""What the documents show is what happens: python blocks run, `$ stabletrain` commands succeed.

One namespace and one empty folder for each document, its blocks in order. What cannot run is a ```text block.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    {
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("plugins/**/README.md"),
        *ROOT.glob("recipes/*.md"),
    }
)

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<body>.*?)^(?P=indent)```\s*$", re.MULTILINE | re.DOTALL
)
TRAINS = ("train", "reproduce", "plan")


class Block(NamedTuple):
    """A fenced block: its language, its text, the line where it begins."""

    language: str
    text: str
    line: int


def blocks(document: Path, language: str) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = [
        Block(match["language"], match["body"], text.count("\n", 0, match.start()) + 2)
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if block.language == language]


def commands(document: Path) -> list[str]:
    """The `$ stabletrain` lines of the console blocks, with continuation lines joined."""
    lines = [
        line.strip()
        for block in blocks(document, "console")
        for line in block.text.replace("\\\n", " ").splitlines()
        if line.strip().startswith("$ stabletrain")
    ]
    return [line.removeprefix("$ ") for line in lines]


def _id(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


WITH_PYTHON = [pytest.param(each, id=_id(each)) for each in DOCUMENTS if blocks(each, "python")]
COMMANDS = [
    pytest.param(command, id=f"{_id(each)}: {command}", marks=[pytest.mark.slow] if _trains else [])
    for each in DOCUMENTS
    for command in dict.fromkeys(commands(each))
    for _trains in [shlex.split(command)[1:2] in [[word] for word in TRAINS]]
]


def _run(arguments: list[str], folder: Path) -> None:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "COLUMNS": "200"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_blocks_run(document: Path, tmp_path: Path) -> None:
    # catches an example that a rename or a changed default broke; a process of its own, as a reader would run it
    lines: list[str] = []
    for block in blocks(document, "python"):
        lines += [""] * (block.line - 1 - len(lines))  # so that a traceback has the document's line numbers
        lines += block.text.splitlines()
    script = tmp_path / f"{document.stem}_md.py"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _run([sys.executable, "-W", "ignore", script.name], tmp_path)


@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_blocks_compile_and_name_what_exists(document: Path) -> None:
    # the quick half of the test above
    import stabletrain

    for block in blocks(document, "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and node.module == "stabletrain":
                unknown = {alias.name for alias in node.names} - set(stabletrain.__all__) - {"testing"}
                assert not unknown, f"{_id(document)}:{block.line} imports {unknown} from stabletrain"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_succeed(command: str, tmp_path: Path) -> None:
    # catches a command, option or group in the documents that the command line does not have
    _run([sys.executable, "-m", *shlex.split(command, comments=True)], tmp_path)


def test_fences_are_understood(tmp_path: Path) -> None:
    # catches a pattern that finds nothing, and so tests nothing
    document = tmp_path / "doc.md"
    document.write_text(
        "text\n\n```python\na = 1\n```\n\n1. item\n\n"
        "   ```console\n   $ stabletrain ls \\\n     plugins\n   output\n   ```\n"
        "```text\n$ stabletrain no\n```\n"
    )
    assert blocks(document, "python") == [Block("python", "a = 1\n", 4)]
    assert [shlex.split(each) for each in commands(document)] == [["stabletrain", "ls", "plugins"]]


ARCHITECTURE = ROOT / "docs" / "architecture.md"
CODE = re.compile(r"`([A-Za-z_][\w.]*)`")
IN_BLOCK = re.compile(r"\b([A-Z]\w+\.\w+|[a-z]+_[a-z_]+)\b")


def defined_names() -> set[str]:
    """Every class, function, method, field and module of the package and its plugins: ``name`` and ``Class.name``."""
    found: set[str] = set()
    for folder in (ROOT / "stabletrain", ROOT / "plugins" / "stabletrain_plugins"):
        for path in folder.rglob("*.py"):
            found.add(path.stem)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    found.add(node.name)
                if isinstance(node, ast.ClassDef):
                    for inner in node.body:
                        if isinstance(inner, ast.FunctionDef):
                            found.add(f"{node.name}.{inner.name}")
                        elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                            found |= {inner.target.id, f"{node.name}.{inner.target.id}"}
    return found


def known_elsewhere(name: str) -> bool:
    """Whether it is a public callback, or a name of Lightning's or torch's that the page may use."""
    import stabletrain

    owners: dict[str, Any] = {"trainer": Trainer, "optimizer": torch.optim.Optimizer, "loss": torch.Tensor}
    first, _, rest = name.partition(".")
    if first in owners and rest:
        return hasattr(owners[first], rest)
    if first == "Trainer":
        return hasattr(Trainer, rest) or not rest
    of_lightning = (Callback, LightningModule)
    return name in stabletrain.__all__ or any(hasattr(owner, name) for owner in of_lightning) or name == LOG_EVERY


LOG_EVERY = "log_every_n_steps"


def test_links_of_the_readme_are_absolute_and_name_files_of_the_repository() -> None:
    """Bug: a relative link or picture is dead on the package's page; an absolute one names a file that was moved."""
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    raw = repository.replace("github.com", "raw.githubusercontent.com")
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert link.startswith("https://"), link
        base = f"{raw}/main/" if link.endswith(".png") else f"{repository}/blob/main/"
        if link.startswith(base):
            assert (ROOT / link.removeprefix(base)).exists(), link
        else:
            assert not link.startswith((raw, repository)), link


def test_names_and_links_of_the_architecture_page_exist() -> None:
    # catches a page that a rename or a move has made wrong
    text = ARCHITECTURE.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (ARCHITECTURE.parent / link).resolve().exists(), link
    diagrams = "\n".join(block.text for block in blocks(ARCHITECTURE, "text"))
    names = set(CODE.findall(FENCE.sub("", text))) | set(IN_BLOCK.findall(diagrams))
    assert len(names) > 40
    files = {"events.jsonl"}
    known = defined_names()
    unknown = [name for name in sorted(names - files - known) if not known_elsewhere(name)]
    assert unknown == []


def test_the_nan_is_followed_in_few_files_and_lines() -> None:
    # catches a walk that has grown until nobody takes it
    section = ARCHITECTURE.read_text(encoding="utf-8").split("## Follow one NaN")[1].split("\n## ")[0]
    assert len(section.strip().splitlines()) <= 40
    steps = re.findall(r"^\d+\. \[[^]]+\]\(([^)]+\.py)\)", section, re.MULTILINE)
    assert 1 <= len(set(steps)) <= 5
