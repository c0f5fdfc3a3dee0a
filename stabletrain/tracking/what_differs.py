"""What differs between two runs as they were recorded, the most likely cause of other bits first. Pure functions.

The records may come from anybody: a value of an unexpected type is not recorded, and text is shown as its ``repr``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple

Kind = Literal["config", "code", "data", "initial weights", "packages", "settings", "threads", "world size", "hardware"]
KINDS: tuple[Kind, ...] = (
    "config", "code", "data", "initial weights", "packages", "settings", "threads", "world size", "hardware",
)  # fmt: skip
"""The most likely cause of other bits first."""

_FIRST_PACKAGES = ("torch", "lightning", "numpy")
_FREE = re.compile(
    r"platform\.release|cpu\.(memory_bytes|logical|usable)|gpus\.\d+\.memory|nodes\.\d+\.(rank|cpu\.\w+)"
    r"|variables\.(CUDA_VISIBLE_DEVICES|CUDA_LAUNCH_BLOCKING|PYTORCH_CUDA_ALLOC_CONF)"
)
"""What changes no result: sizes of memory, the number of cores (threads are set), which of equal devices is used."""
_OF_KIND: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("threads", re.compile(r"(^|\.)(threads|interop_threads)$|(OMP|MKL|OPENBLAS)_\w+$|KMP_AFFINITY$")),
    ("world size", re.compile(r"(^|\.)world_size$|WORLD_SIZE$|^training\.nodes$|^nodes$")),
    ("packages", re.compile(r"^(packages|python)\.|(^|\.)torch\.(version|lightning|cuda|cudnn)$")),
    ("hardware", re.compile(r"(^|\.)(cpu|gpus|platform|hardware|accelerator|cpu_capability)(\.|$)")),
)
_REPEATED = {"torch.version": "torch", "torch.lightning": "lightning"}
"""Keys of which the version is among the packages, too."""
_OF_NODE = re.compile(r"^nodes\.\d+\.")
_LONGEST = 100
_MISSING = object()


class Record(NamedTuple):
    """What a run has recorded of itself; None: not recorded.

    Args:
        config: the content of run.yaml.
        environment: that of environment.json.
        code: that of code.json: by package, ``version`` or ``files`` with their sha256.
        data: that of data.json: ``fingerprint``, ``first_batch``, ``initial_weights``.
        git: that of git.json: ``sha`` and ``dirty``.
    """

    config: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] | None = None
    code: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    git: Mapping[str, Any] | None = None


class Imported(NamedTuple):
    """What the repeat has imported.

    Args:
        modules: by full name.
        distributions: name of a top-level module -> names of the distributions that provide it.
    """

    modules: Collection[str]
    distributions: Mapping[str, Collection[str]]

    def has_distribution(self, name: str) -> bool:
        """Whether a module of a distribution was imported; one without known modules counts as imported.

        Args:
            name: of the distribution.
        """
        tops = [top for top, names in self.distributions.items() if name in names]
        return not tops or any(top in self.modules for top in tops)


class Difference(NamedTuple):
    """One difference: of which kind, and what it was and is."""

    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


class Differences(NamedTuple):
    """The differences between two records.

    Args:
        likely: that may change bits, the most likely first.
        harmless: of which no result depends.
        unknown: what one of the two has not recorded.
    """

    likely: list[Difference]
    harmless: list[Difference]
    unknown: list[str]


def what_differs(then: Record, now: Record, imported: Imported | None = None) -> Differences:
    """Compare what two runs have recorded of themselves.

    Args:
        then: of the original.
        now: of the repeat.
        imported: by the repeat; None: unknown, so that every package and file may matter.
    """
    found = Differences([], [], [])
    named = _named_packages(then.config or {})
    if then.config is None or now.config is None:
        found.unknown.append("config")
    else:
        found.likely.extend(Difference("config", text) for text in _changes(then.config, now.config))
    _compare_code(then, now, imported, found)
    _compare_data(then.data, now.data, found)
    _compare_environment(then.environment, now.environment, imported, named, found)
    found.likely.sort(key=lambda each: KINDS.index(each.kind))
    return found


def _compare_code(then: Record, now: Record, imported: Imported | None, found: Differences) -> None:
    commits = [(each.git or {}).get("sha") for each in (then, now)]
    commit = f"commit {_shown(commits[0])} -> {_shown(commits[1])}" if commits[0] and commits[0] != commits[1] else ""
    if not then.code or not now.code:
        found.unknown.append("code by content")
        if commit:
            found.likely.append(Difference("code", commit))
        return
    if commit:
        found.harmless.append(Difference("code", f"{commit}; the files that it changed are compared by content"))
    modules = None if imported is None else imported.modules
    for package in sorted({*then.code, *now.code}, key=lambda name: (name.startswith("stabletrain"), name)):
        before, after = (_files(each.get(package)) for each in (then.code, now.code))
        if before is None or after is None:
            if package not in now.code:
                found.unknown.append(f"code of {_plain(package)}, which the repeat has not used")
            elif package not in then.code:
                found.unknown.append(f"code of {_plain(package)}")
            continue
        if any(each[package].get("truncated") for each in (then.code, now.code)):
            found.unknown.append(f"code of {_plain(package)} beyond its first {len(before)} files")
        for path in sorted({*before, *after}):
            if before.get(path) != after.get(path):
                how = "added" if path not in before else "removed" if path not in after else "changed"
                difference = Difference("code", f"{_plain(package)}/{_plain(path)} {how}")
                free = how != "removed" and modules is not None and _module(package, path) not in modules
                (found.harmless if free else found.likely).append(difference)


def _files(entry: object) -> Mapping[str, Any] | None:
    files = entry.get("files") if isinstance(entry, Mapping) else None
    return files if isinstance(files, Mapping) else None


def _module(package: str, path: str) -> str:
    """The module that a file of a package is.

    >>> _module("mine", "net/__init__.py"), _module("mine", "net/block.py"), _module("one", "one.py")
    ('mine.net', 'mine.net.block', 'one')
    """
    if path == f"{package}.py":
        return package
    parts = path.removesuffix(".py").split("/")
    return ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def _compare_data(then: Mapping[str, Any] | None, now: Mapping[str, Any] | None, found: Differences) -> None:
    before, after = then or {}, now or {}
    names: tuple[tuple[str, Kind, str], ...] = (
        ("fingerprint", "data", "fingerprint"),
        ("first_batch", "data", "checksum of the first training batch"),
        ("initial_weights", "initial weights", "checksum"),
    )
    for key, kind, text in names:
        a, b = before.get(key), after.get(key)
        if a is None or b is None:
            if key != "fingerprint" or a != b or not (then and now):  # most data modules have none
                found.unknown.append(f"{kind} ({text})" if kind == "data" else kind)
        elif a != b:
            found.likely.append(Difference(kind, f"{text} {_shown(a)} -> {_shown(b)}"))


def _compare_environment(
    then: Mapping[str, Any] | None,
    now: Mapping[str, Any] | None,
    imported: Imported | None,
    named: Collection[str],
    found: Differences,
) -> None:
    if not then or not now:
        found.unknown.append("environment: packages, settings, threads, world size, hardware")
        return
    before, after = dict(_flat(then)), dict(_flat(now))
    packages: list[tuple[tuple[int, str], Difference]] = []
    for key in sorted({*before, *after}):
        a, b = before.get(key, _MISSING), after.get(key, _MISSING)
        whole = _OF_NODE.sub("", key)  # the first node's entry repeats what is of the whole run
        if a == b or (key in _REPEATED and f"packages.{_REPEATED[key]}" in before):
            continue
        if whole != key and (before.get(whole, _MISSING), after.get(whole, _MISSING)) == (a, b):
            continue
        section = key.partition(".")[0]
        if _MISSING in (a, b) and not (section in ("packages", "variables") and section in then and section in now):
            found.unknown.append(_plain(key))
            continue
        kind: Kind = next((kind for kind, pattern in _OF_KIND if pattern.search(key)), "settings")
        name = key.removeprefix("packages.").removeprefix("variables.")
        difference = Difference(kind, f"{_plain(name)} {_shown(a)} -> {_shown(b)}")
        unused = section == "packages" and imported is not None and not imported.has_distribution(name)
        if unused or _FREE.fullmatch(key):
            found.harmless.append(difference)
        elif kind == "packages":
            packages.append((_rank(name, named), difference))
        else:
            found.likely.append(difference)
    found.likely.extend(difference for _, difference in sorted(packages))


def _rank(name: str, named: Collection[str]) -> tuple[int, str]:
    """Torch, Lightning, numpy and what run.yaml names before all other packages."""
    plain = name.lower().replace("-", "_")
    if name in _FIRST_PACKAGES:
        return _FIRST_PACKAGES.index(name), name
    return (len(_FIRST_PACKAGES) + (plain not in named and name not in ("python.version", "cuda", "cudnn")), name)


def _named_packages(node: object) -> set[str]:
    """The top-level packages that the targets of a config name, in lower case with underscores."""
    if isinstance(node, Mapping):
        target = node.get("_target_")
        own = {target.partition(".")[0].lower()} if isinstance(target, str) else set()
        return own.union(*map(_named_packages, node.values()))
    return set[str]().union(*map(_named_packages, node)) if isinstance(node, list) else set()


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    before, after = dict(_flat(then)), dict(_flat(now))
    for key in sorted({*before, *after}):
        a, b = before.get(key), after.get(key)  # a key that an earlier version did not write is null
        if a is not b and (a != b or type(a) is not type(b)):
            yield f"{_plain(key)} {_shown(a)} -> {_shown(b)}"


def _flat(node: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings and of lists of mappings, by their path."""
    if isinstance(node, Mapping) and (node or prefix == ""):
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list) and any(isinstance(each, Mapping) for each in node):
        for index, value in enumerate(node):
            yield from _flat(value, f"{prefix}.{index}")
    else:
        yield prefix, node


def _shown(value: object) -> str:
    if value is _MISSING:
        return "nothing"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_plain(str(key))}: {_shown(each)}" for key, each in value.items())[:_LONGEST] + "}"
    text = _plain(value) if isinstance(value, str) else f"{value!r}"
    return text[:16] if re.fullmatch(r"[0-9a-f]{32,}", text) else text[:_LONGEST]


def _plain(text: str) -> str:
    """Text that has no effect on a terminal."""
    return text if text.isprintable() else repr(text)
