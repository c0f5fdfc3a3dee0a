"""``stabletrain new-plugin NAME``: make a distribution with a plugin that passes the conformance check."""

from __future__ import annotations

import keyword
import re
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import NamedTuple

from stabletrain.config import discovery
from stabletrain.errors import UserError

_SHAPE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)+")


class _Choice(NamedTuple):
    slot: str
    option: str

    @property
    def group(self) -> str:
        return f"{discovery.SLOTS}/{self.slot}"


def create(name: str, folder: Path) -> Path:
    """Make a distribution with one plugin: a rule, its callback, config, card and tests.

    ``clip_noise`` becomes ``plugins/clip=noise``. With any other verb, the noun is the slot: ``skip_noise`` becomes
    ``plugins/noise=skip``. The rule of a plugin whose name starts with ``skip_`` skips, all others clip.

    Args:
        name: of the plugin and its package: ``verb_noun``, in lower case.
        folder: the parent of the new folder, which has the same name as the plugin.

    Returns:
        The new folder.

    Raises:
        UserError: if the name has another form or is taken, or the new folder already exists.
    """
    _check_shape(name)
    choice = _choice(name)
    _check_free(name, choice)
    home = folder.resolve() / name
    if home.exists():
        raise UserError(f"new-plugin: {home} already exists; choose another name, or another folder with --in")
    if not folder.is_dir():
        raise UserError(f"new-plugin: there is no folder {folder}; make it first, or choose another with --in")
    try:
        _write(home, name, choice)
    except OSError as error:
        raise UserError(f"new-plugin: {home} cannot be written: {error}; choose another folder with --in") from error
    return home


def _check_shape(name: str) -> None:
    if not _SHAPE.fullmatch(name):
        raise UserError(
            f"new-plugin: expected a name such as clip_noise (verb_noun: lower case, words joined by '_'), got {name!r}"
        )
    if keyword.iskeyword(name) or any(keyword.iskeyword(part) for part in name.split("_")[:1]):
        raise UserError(f"new-plugin: {name!r} starts with a Python keyword; choose another verb")


def _choice(name: str) -> _Choice:
    verb, noun = name.split("_", 1)
    return _Choice(verb, noun) if verb == "clip" else _Choice(noun, verb)


def _check_free(name: str, choice: _Choice) -> None:
    plugins, groups = discovery.plugins(), discovery.groups()
    if name in plugins:
        raise UserError(
            f"new-plugin: the plugin {name!r} already exists in {plugins[name].distribution}; choose another name"
        )
    if name in sys.stdlib_module_names or name.split("_")[0] == "stabletrain":
        raise UserError(f"new-plugin: {name!r} is the name of another package; choose another name")
    if choice.option in groups.get(choice.group, {}):
        raise UserError(
            f"new-plugin: the option {choice.group}={choice.option} of {name!r} already exists; choose another name"
        )


def _write(home: Path, name: str, choice: _Choice) -> None:
    what = "skip" if name.startswith("skip_") else "clip"
    verb = {"clip": "Clip the gradient norm to", "skip": "Skip a step whose gradient norm is above"}[what]
    words = {
        "name": name,
        "distribution": name.replace("_", "-"),
        "class_name": "".join(part.capitalize() for part in name.split("_")),
        "slot": choice.slot,
        "choice": f"{choice.group}={choice.option}",
        "summary": f"{verb} a multiple of its moving mean",
        "caught": {"clip": "clipped", "skip": "skipped"}[what],
    }
    conf = f"{name}/conf/{choice.group}"
    wanted = {
        ".gitignore": "gitignore",
        "pyproject.toml": "pyproject.toml",
        f"{name}/__init__.py": "init.py",
        f"{name}/callback.py": "callback.py",
        f"{name}/rule.py": f"rule_{what}.py",
        f"{name}/README.md": f"card_{what}.md",
        f"{conf}/{choice.option}.yaml": f"option_{what}.yaml",
        f"tests/test_{name}.py": "test.py",
    }
    if choice.group not in discovery.groups():
        wanted[f"{conf}/none.yaml"] = "none.yaml"
    templates = files("stabletrain.testing") / "template_files"
    # written to a temporary folder and moved, so that a failure leaves no incomplete distribution
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=f".{name}-") as temporary:
        for path, template in wanted.items():
            target = Path(temporary) / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            text = (templates / f"{template}.tmpl").read_text(encoding="utf-8")
            target.write_text(Template(text).substitute(words), encoding="utf-8")
        shutil.move(Path(temporary) / name, home)
