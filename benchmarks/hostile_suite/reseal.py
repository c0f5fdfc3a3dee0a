"""Checkpoints whose content somebody changed, and whose checksums and sizes they computed anew: all of them fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import xxhash

from stabletrain.runtime.checkpoints.manifest import NAME as MANIFEST
from stabletrain.runtime.checkpoints.manifest import STATE, TENSORS

HUGE = "@HUGE@"
DEEP = "@DEEP@"
_RAW = {f'"{HUGE}"': "1e400", f'"{DEEP}"': "[" * 100_000 + "]" * 100_000}
"""What Python's JSON cannot write is put into the text."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 2**31, 2**63, 10**400, 0.5, -0.0, HUGE, DEEP),
    *("", "x", "../../etc/passwd", "a\0b", "x" * 100_000, "nan", "\ud800"),
    *([], [[]], [None], [0], {}, {"T": 0}, {"T": -1}, {"T": 10**9}, {"d": []}, {"d": [["x", 1]]}, {"d": [[[], 1]]}),
    *({"t": [1]}, {"s": [[1]]}, {"fs": 3}, {"q": [[1, 2], -1]}, {"N": 0}, {"W": {}}, {"W": {"class": "os.system"}}),
    *({"f": "inf"}, {"f": "nan"}, {"f": 3}, {"c": ["1"]}, {"b": "%%%"}, {"path": 3}, {"device": "nowhere"}),
    *({"dtype": "load"}, {"dtype": "int32"}, {"size": [-1]}, {"unknown": 1}, {"d": [], "t": []}, {"o": [], "m": 3}),
)


class Change(NamedTuple):
    """A change of one checkpoint.

    Args:
        name: what was changed to what.
        apply: changes the three files in a folder, and seals it.
    """

    name: str
    apply: Callable[[Path], None]


def changes(folder: Path, generator: Random) -> Iterator[Change]:
    """Endless changes of a checkpoint: structural ones first, then any field of any file to any value.

    Args:
        folder: the checkpoint, to see its fields; not changed.
        generator: chooses.
    """
    yield from STRUCTURAL
    manifest, state = json.loads((folder / MANIFEST).read_bytes()), json.loads((folder / STATE).read_bytes())
    places = {
        MANIFEST: [path for path in _paths(manifest) if path and path[-1] != "checksum"],
        "tensors": list(_paths(state["tensors"], ("tensors",))),
        "tree": _rare_first(list(_paths(state["tree"], ("tree",)))),
    }
    while True:
        kind = generator.choice(list(places))
        path = generator.choice(places[kind])
        value = generator.choice(VALUES)
        action = generator.choice(["set", "set", "set", "remove", "double"])
        where = MANIFEST if kind == MANIFEST else STATE
        yield Change(
            f"{where} {'.'.join(map(str, path))}: {action} {_shown(value)}", _change(where, path, action, value)
        )


def reseal(folder: Path) -> None:
    """Write sizes and checksums that fit into the manifest of a checkpoint."""
    content = json.loads((folder / MANIFEST).read_bytes())
    for name in (STATE, TENSORS):
        raw = (folder / name).read_bytes()
        content["files"][name] = {"bytes": len(raw), "xxh3_128": xxhash.xxh3_128(raw).hexdigest()}
    sign(folder, content)


def sign(folder: Path, content: Any) -> None:
    """Write a manifest with a checksum that fits."""
    if isinstance(content, dict):
        content.pop("checksum", None)
        checksum = xxhash.xxh3_128(json.dumps(content).encode()).hexdigest()
        content = {**content, "checksum": checksum}
    (folder / MANIFEST).write_bytes((_text(content, indent=1) + "\n").encode())


def _change(where: str, path: tuple[Any, ...], action: str, value: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / where).read_bytes())
        if not path:
            content = value
        else:
            parent = content
            for step in path[:-1]:
                parent = parent[step]
            last = path[-1]
            if action == "remove":
                del parent[last]
            elif action == "double" and isinstance(parent, list):
                parent.insert(last, copy.deepcopy(parent[last]))
            else:
                parent[last] = value
        if where == MANIFEST:
            sign(folder, content)
        else:
            (folder / where).write_bytes(_text(content).encode())
            reseal(folder)

    return apply


def _text(content: Any, indent: int | None = None) -> str:
    text = json.dumps(content, indent=indent)
    for mark, raw in _RAW.items():
        text = text.replace(mark, raw)
    return text


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _paths(each, (*path, key))
    elif isinstance(value, list):
        for i, each in enumerate(value[:20]):  # the words of a random generator are all alike
            yield from _paths(each, (*path, i))


def _rare_first(paths: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Shallow places as often as the many deep ones."""
    shallow = [path for path in paths if len(path) <= 8]
    return paths + shallow * max(1, len(paths) // max(1, len(shallow)))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 50 else text[:50] + "..."


def _in_state(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = json.loads((folder / STATE).read_bytes())
        edit(state)
        (folder / STATE).write_bytes(_text(state).encode())
        reseal(folder)

    return apply


def _in_header(edit: Callable[[dict[str, Any]], None], pad: bytes = b" ") -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        raw = (folder / TENSORS).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        edit(header)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += pad * (-len(text) % 8)
        (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        reseal(folder)

    return apply


def _tensor(state: dict[str, Any]) -> list[Any]:
    """The entry of the largest floating-point tensor of the weights."""
    entries = [each for each in state["tensors"] if each[0].startswith("state_dict") and each[1] == "float32"]
    found: list[Any] = max(entries, key=lambda each: len(each[2]))
    return found


def _set_dtype(dtype: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: _tensor(state).__setitem__(1, dtype)


def _set_shape(change: Callable[[list[int]], list[int]]) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        entry = _tensor(state)
        entry[2] = change(entry[2])

    return edit


def _both(dtype: str, short: str) -> Callable[[Path], None]:
    """Another dtype of the same width, in the header and in the state alike."""

    def apply(folder: Path) -> None:
        name = _tensor(json.loads((folder / STATE).read_bytes()))[0]
        _in_header(lambda header: header[name].update(dtype=short))(folder)
        _in_state(_set_dtype(dtype))(folder)

    return apply


def _first(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(header.values()))
    return found


def _raw_state(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / STATE).write_bytes(change((folder / STATE).read_bytes()))
        reseal(folder)

    return apply


def _raw_manifest(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / MANIFEST).write_bytes(change((folder / MANIFEST).read_bytes()))

    return apply


def _sparse_tensors(folder: Path) -> None:
    """A file of 4 TB that takes no space, announced with its size: the checksum cannot be right, but comes last."""
    with (folder / TENSORS).open("ab") as file:
        file.truncate(1 << 42)
    content = json.loads((folder / MANIFEST).read_bytes())
    content["files"][TENSORS]["bytes"] = 1 << 42
    sign(folder, content)


def _sparse_and_announced(folder: Path) -> None:
    """The same, with a tensor of that size in the header and in the state."""
    state = json.loads((folder / STATE).read_bytes())
    state["tensors"] = [["x", "uint8", [1 << 42]]]
    state["tree"] = {"d": [["x", {"T": 0}]]}
    (folder / STATE).write_bytes(json.dumps(state).encode())
    text = json.dumps({"x": {"dtype": "U8", "shape": [1 << 42], "data_offsets": [0, 1 << 42]}}, separators=(",", ":"))
    raw = text.encode() + b" " * (-len(text) % 8)
    (folder / TENSORS).write_bytes(len(raw).to_bytes(8, "little") + raw)
    reseal(folder)
    size = 8 + len(raw) + (1 << 42)
    with (folder / TENSORS).open("ab") as file:
        file.truncate(size)
    content = json.loads((folder / MANIFEST).read_bytes())
    content["files"][TENSORS]["bytes"] = size
    sign(folder, content)


STRUCTURAL = (
    Change("int32 for float32 in the state", _in_state(_set_dtype("int32"))),
    Change("int32 for float32 in the header", _in_header(lambda header: _first(header).update(dtype="I32"))),
    Change("int32 for float32 in both", _both("int32", "I32")),
    Change("complex32 for float32 in both", _both("complex32", "U8")),
    Change("quantized", _in_state(_set_dtype("qint32"))),
    Change("no dtype", _in_state(_set_dtype("load"))),
    Change("a shape of one dimension", _in_state(_set_shape(lambda shape: [shape[0] * shape[-1]]))),
    Change("a negative shape", _in_state(_set_shape(lambda shape: [-1, *shape]))),
    Change("a shape with a zero", _in_state(_set_shape(lambda shape: [0, *shape]))),
    Change("a shape of 2**70", _in_state(_set_shape(lambda shape: [2**70]))),
    Change("65 dimensions", _in_state(_set_shape(lambda shape: [1] * 65 + shape))),
    Change("zero and too large", _in_state(_set_shape(lambda shape: [2**61, 2**61, 0]))),
    Change("two names alike", _in_state(lambda state: state["tensors"].append(state["tensors"][0]))),
    Change("the reserved name", _in_state(lambda state: state["tensors"][0].__setitem__(0, "__metadata__"))),
    Change("a name with ..", _in_state(lambda state: state["tensors"][0].__setitem__(0, "../../x"))),
    Change("no tensors", _in_state(lambda state: state.update(tensors=[]))),
    Change("tensors in another order", _in_state(lambda state: state["tensors"].reverse())),
    Change("overlapping offsets", _in_header(lambda header: _first(header).update(data_offsets=[0, 8]))),
    Change("negative offsets", _in_header(lambda header: _first(header).update(data_offsets=[-8, 8]))),
    Change("an unknown dtype in the header", _in_header(lambda header: _first(header).update(dtype="F3"))),
    Change("a header of another type", _in_header(lambda header: header.update(x=[]))),
    Change("another padding", _in_header(lambda header: header.update(a={}), pad=b"\0")),
    Change("nested 100,000 deep", _in_state(lambda state: state.update(tree=DEEP))),
    Change("no object", _raw_state(lambda raw: b"[]")),
    Change("no JSON", _raw_state(lambda raw: raw[:-1])),
    Change("NaN", _raw_state(lambda raw: b'{"tree": NaN, "tensors": []}')),
    Change("UTF-16", _raw_state(lambda raw: raw.decode().encode("utf-16"))),
    Change("bytes that are no text", _raw_state(lambda raw: b"\xff\xfe\x00\xd8" + raw)),
    Change("a key twice", _raw_state(lambda raw: raw.replace(b'{"tree"', b'{"tree": 3, "tree"', 1))),
    Change("a million lists", _raw_state(lambda raw: b'{"tree": [' + b"[]," * 1_000_000 + b'[]], "tensors": []}')),
    Change(
        "a reference to its own tag", _raw_state(lambda raw: b'{"tree": {"d": [["x", {"d": "x"}]]}, "tensors": []}')
    ),
    Change("an empty manifest object", _raw_manifest(lambda raw: b"{}\n")),
    Change("a manifest of 100 MB", _raw_manifest(lambda raw: raw + b" " * 100_000_000)),
    Change("a manifest that is a list", lambda folder: sign(folder, [])),
    Change("a file of 4 TB", _sparse_tensors),
    Change("a file of 4 TB with a tensor", _sparse_and_announced),
)
