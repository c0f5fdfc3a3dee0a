"""Which difference between two records is named, and in which order."""

import copy

import pytest

from stabletrain.tracking.what_differs import KINDS, Imported, Record, what_differs

SHA = {name: name * 64 for name in "abcdef"}
THEN = Record(
    config={"seed": 0, "model": {"_target_": "mine.Net", "width": 4}, "optimizer": {"_target_": "pytorch_optimizer.X"}},
    environment={
        "python": {"version": "3.11.9", "implementation": "CPython"},
        "platform": {"system": "Linux", "release": "6.1", "machine": "x86_64"},
        "cpu": {"model": "one", "logical": 2, "usable": 2, "memory_bytes": 1},
        "gpus": [{"name": "H100", "memory": "80 GB", "driver": "1"}],
        "torch": {"version": "2.13.0", "threads": 1, "deterministic_algorithms": True},
        "variables": {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "1"},
        "training": {"world_size": 1, "compiled": False, "hardware": "cpu x86_64"},
        "packages": {"torch": "2.13.0", "numpy": "2.0", "zlib-ng": "1", "aiohttp": "3", "pytorch-optimizer": "3.0"},
    },
    code={
        "mine": {"files": {"__init__.py": SHA["a"], "net.py": SHA["b"], "test_net.py": SHA["c"]}},
        "stabletrain": {"files": {"errors.py": SHA["d"]}},
        "torch": {"version": "2.13.0"},
    },
    data={"fingerprint": {"name": "text", "digest": "1234"}, "first_batch": SHA["e"], "initial_weights": SHA["f"]},
    git={"sha": "a" * 40, "dirty": False},
)
IMPORTED = Imported(
    {"mine", "mine.net", "torch", "numpy", "stabletrain.errors", "pytorch_optimizer"},
    {"aiohttp": ["aiohttp"], "torch": ["torch"], "numpy": ["numpy"], "pytorch_optimizer": ["pytorch-optimizer"]},
)


def changed(**values) -> Record:
    """The record with other values: ``environment__torch__threads=2``; Ellipsis removes one."""
    parts = copy.deepcopy(THEN._asdict())
    for path, value in values.items():
        *above, last = path.split("__")
        node = parts
        for name in above:
            node = node[name]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    return Record(**parts)


def test_equal_records_have_no_differences():
    """Bug: what is equal is listed, as nested values that are compared by identity."""
    assert what_differs(THEN, changed(), IMPORTED) == ([], [], [])
    assert what_differs(THEN, changed()) == ([], [], [])
    assert what_differs(THEN, changed(config__param_groups=None)) == ([], [], [])


ONE = [
    ("config", {"config__model__width": 5}, "model.width 4 -> 5"),
    ("config", {"config__seed": False}, "seed 0 -> False"),
    ("code", {"code__mine": {"files": {**THEN.code["mine"]["files"], "net.py": SHA["c"]}}}, "mine/net.py changed"),
    ("code", {"code__stabletrain__files": {}}, "stabletrain/errors.py removed"),
    ("data", {"data__fingerprint": {"name": "text", "digest": "5"}}, "1234"),
    ("data", {"data__first_batch": SHA["a"]}, "first training batch eeeeeeeeeeeeeeee -> aaaaaaaaaaaaaaaa"),
    ("initial weights", {"data__initial_weights": SHA["a"]}, "checksum"),
    ("packages", {"environment__packages__numpy": "1.0"}, "numpy 2.0 -> 1.0"),
    ("packages", {"environment__packages__numpy": ...}, "numpy 2.0 -> nothing"),
    ("settings", {"environment__torch__deterministic_algorithms": False}, "deterministic_algorithms True -> False"),
    ("settings", {"environment__variables__NVIDIA_TF32_OVERRIDE": "1"}, "NVIDIA_TF32_OVERRIDE nothing -> 1"),
    ("settings", {"environment__training__compiled": True}, "training.compiled False -> True"),
    ("threads", {"environment__torch__threads": 2}, "torch.threads 1 -> 2"),
    ("threads", {"environment__variables__OMP_NUM_THREADS": "2"}, "OMP_NUM_THREADS 1 -> 2"),
    ("world size", {"environment__training__world_size": 2}, "training.world_size 1 -> 2"),
    ("hardware", {"environment__cpu__model": "two"}, "cpu.model one -> two"),
    ("hardware", {"environment__gpus": [{"name": "A100", "memory": "80 GB", "driver": "1"}]}, "gpus.0.name"),
]


@pytest.mark.parametrize(("kind", "values", "text"), ONE)
def test_one_difference_is_named_alone(kind, values, text):
    """Bugs: a difference is missed, of another kind, or listed twice (the version of torch is in two places)."""
    found = what_differs(THEN, changed(**values), IMPORTED)
    ((found_kind, found_text),) = found.likely
    assert found_kind == kind
    assert text in found_text
    assert (found.harmless, found.unknown) == ([], [])


def test_the_most_likely_cause_is_first_and_what_cannot_matter_last():
    """Bugs: thirty packages that changed with torch bury it; a package that nothing imported, or a test file, is named
    as a cause; the order of the kinds is another."""
    together = {
        key: value for kind, values, _ in ONE for key, value in values.items() if key != "code__stabletrain__files"
    }
    together |= {"environment__packages__torch": "2.12.0", "environment__packages__zlib-ng": "2"}
    together |= {"environment__packages__pytorch-optimizer": "3.1", "environment__packages__aiohttp": "4"}
    together |= {"environment__platform__release": "6.2", "git__sha": "b" * 40}
    together["environment__packages__numpy"] = "1.0"
    together["code__mine"] = {"files": {"__init__.py": SHA["a"], "net.py": SHA["c"], "test_net.py": SHA["d"]}}
    found = what_differs(THEN, changed(**together), IMPORTED)
    kinds = [each.kind for each in found.likely]
    assert list(dict.fromkeys(kinds)) == list(KINDS)
    packages = [each.text.split()[0] for each in found.likely if each.kind == "packages"]
    assert packages == ["torch", "numpy", "pytorch-optimizer", "zlib-ng"]
    harmless = [str(each) for each in found.harmless]
    for text in ("mine/test_net.py changed", "aiohttp 3 -> 4", "platform.release", "commit"):
        assert any(text in each for each in harmless), text
    assert not [each for each in found.likely if each.text in harmless]
    everything = what_differs(THEN, changed(**together)).likely
    assert any("aiohttp" in each.text for each in everything)  # without knowing what was imported it may matter


def test_what_is_not_recorded_is_unknown_and_never_equal():
    """Bugs: a missing record counts as equal, or as a difference; a new key of a later version is a difference."""
    nothing = what_differs(Record(), THEN, IMPORTED)
    assert nothing.likely == nothing.harmless == []
    for text in ("config", "code by content", "first training batch", "initial weights", "environment"):
        assert any(text in each for each in nothing.unknown), text
    found = what_differs(changed(data__first_batch=None, environment__training=..., code__mine=...), THEN, IMPORTED)
    assert found.likely == []
    assert sorted(found.unknown) == [
        "code of mine",
        "data (checksum of the first training batch)",
        "training.compiled",
        "training.hardware",
        "training.world_size",
    ]
    files = {**THEN.code["mine"], "truncated": True}
    assert what_differs(changed(code__mine=files), THEN).unknown == ["code of mine beyond its first 3 files"]
    nodes = [{"rank": 0, "torch": {"threads": 1}}], [{"rank": 0, "torch": {"threads": 2}}]
    again = changed(environment__nodes=nodes[1], environment__torch__threads=2)
    assert len(what_differs(changed(environment__nodes=nodes[0]), again).likely) == 1
    no_code = what_differs(changed(code=None), changed(git__sha="b" * 40), IMPORTED)
    assert [each.kind for each in no_code.likely] == ["code"]
    odd = Record(config={"a": "\x1b[31m"}, environment={"torch": 3}, code={"mine": 3}, data={"first_batch": [1]})
    assert "\x1b" not in str(what_differs(odd, changed()))
