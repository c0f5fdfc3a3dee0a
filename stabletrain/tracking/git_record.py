"""The state in git of the user's folder, and of every repository that holds a package of the run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stabletrain.tracking.code_files import BY_VERSION, package_paths
from stabletrain.tracking.git import git_state, repository_of
from stabletrain.tracking.json_files import as_json, write_texts

GIT_JSON = "git.json"


def git_record(code: str | Path, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return the state of the repository that contains a folder, and of those that hold packages.

    Args:
        code: folder of the user's code.
        packages: names; those that no repository holds are in no list.

    Returns:
        As `stabletrain.tracking.git_state` of the folder, and ``repositories``: of each that holds packages the same,
        and ``packages``, their names.
    """
    held: dict[Path, list[str]] = {}
    for name in packages:
        tops = () if name in BY_VERSION else map(repository_of, package_paths(name))
        for top in dict.fromkeys(tops):
            if top is not None:
                held.setdefault(top, []).append(name)
    folder = Path(os.path.realpath(code))
    own = next((top for top in held if folder.is_relative_to(top) and repository_of(folder) == top), None)
    states = {top: git_state(top) for top in held}
    mine = states[own] if own is not None else git_state(code)
    return {**mine, "repositories": [{"packages": held[top], **state} for top, state in states.items()]}


def write_git(folder: str | Path, record: Mapping[str, Any]) -> list[Path]:
    """Write ``git.json`` and the uncommitted changes: ``git.diff``, and ``git-<package>.diff`` for other repositories.

    In ``repositories``, ``diff`` is the name of the file with the changes; None if there are none.

    Args:
        folder: the folder to write to; made if missing.
        record: from `git_record`.
    """
    state = {key: value for key, value in record.items() if key != "diff"}
    texts = {"git.diff": record["diff"]}
    state["repositories"] = []
    for repository in record["repositories"]:
        is_own = all(repository[key] == record[key] for key in ("sha", "branch", "diff", "untracked"))
        name = "git.diff" if is_own else f"git-{repository['packages'][0]}.diff"
        texts[name] = repository["diff"]
        state["repositories"].append({**repository, "diff": name if repository["diff"] else None})
    files = {name: f"{diff}\n" for name, diff in texts.items() if diff}
    return write_texts(folder, {GIT_JSON: as_json(state), **files})
