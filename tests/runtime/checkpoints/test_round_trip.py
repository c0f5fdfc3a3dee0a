"""What is read equals what was written: values, types and bits; and what is no data is refused."""

import collections
import copy
import enum
import functools
import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from stabletrain.runtime.checkpoints import CheckpointError, CheckpointInfo, Saver, Store, load
from stabletrain.runtime.checkpoints.decoding import decode
from stabletrain.runtime.checkpoints.encoding import Encoded
from stabletrain.testing.checks.equality import differences, same

TENSORS = {
    "fp64": torch.randn(3, dtype=torch.float64),
    "fp32": torch.randn(2, 3),
    "fp16": torch.randn(3).half(),
    "bf16": torch.randn(3, 5).bfloat16(),
    "fp8": torch.randn(4).to(torch.float8_e4m3fn),
    "int64": torch.tensor([2**62, -1]),
    "int8": torch.arange(-3, 4, dtype=torch.int8),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "uint16": torch.tensor([65535], dtype=torch.uint16),
    "bool": torch.tensor([[True], [False]]),
    "complex64": torch.randn(2, dtype=torch.complex64),
    "complex128": torch.randn(3, dtype=torch.complex128),
    "0-d": torch.tensor(7.0),
    "0-d bf16": torch.tensor(7.0).bfloat16(),
    "empty": torch.empty(0),
    "empty 2-d": torch.empty(3, 0, dtype=torch.int32),
    "transposed": torch.randn(3, 4).t(),
    "strided": torch.randn(10)[1::3],
    "expanded": torch.randn(1, 3).expand(4, 3),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "nan": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
    "parameter": torch.nn.Parameter(torch.randn(3)).data,
}


class Colour(enum.IntEnum):
    RED = 3


class Pair(NamedTuple):
    one: int
    other: int


PLAIN: dict[str, Any] = {
    "none": None,
    "bool, not int": [True, 1, False, 0],
    "int": [0, -(2**70), 10**30],
    "float": [0.1, -0.0, 5e-324, 1.7976931348623157e308],
    "inf": [math.inf, -math.inf],
    "text": ["", "é\n\x00", "\ud800", "T"],
    "bytes": b"\x00\xff",
    "complex": complex(-0.0, 2.5),
    "int keys": {0: {"exp_avg": 1}, 1: {"exp_avg": 2}, -1: {}},
    "mixed keys": {1: "a", "1": "b", None: "c", (1, 2): "d", 2.5: "e", True is False: "f"},
    "tuple": (1, (2, [3, (4,)]), ()),
    "looks like a tag": {"T": 0, "d": [["x", 1]]},
    "set": {1, 2},
    "frozenset": frozenset({"a"}),
    "deque": collections.deque([1, 2], maxlen=5),
    "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
    "random": random.getstate(),
    "dtype": [torch.bfloat16, torch.device("cuda:1"), torch.Size([2, 3])],
    "path": Path("/x/y"),
}


def through_a_file(tmp_path: Path, checkpoint: dict[str, Any], background: bool = True) -> dict[str, Any]:
    saver = Saver(Store(tmp_path), background=background)
    saver.save(checkpoint, CheckpointInfo(step=1, run="a"))
    saver.wait()
    assert saver.newest is not None
    return load(saver.newest)


@pytest.mark.parametrize("background", [True, False])
def test_every_kind_of_tensor(tmp_path: Path, background: bool) -> None:
    """A dtype or stride that the copy, the format or the reader treats wrongly."""
    found = through_a_file(tmp_path, TENSORS, background)
    for name, tensor in TENSORS.items():
        assert same(found[name], tensor), name
        assert type(found[name]) is Tensor, name


@pytest.mark.parametrize("name", PLAIN)
def test_every_kind_of_value(tmp_path: Path, name: str) -> None:
    """Keys that become text, tuples that become lists, True that becomes 1: all break load_state_dict."""
    found = through_a_file(tmp_path, {"x": PLAIN[name]})["x"]
    assert same_values(found, PLAIN[name])


def same_values(one: Any, other: Any) -> bool:
    """As `same`, and with the same types and order of keys, which PyTorch's ``load_state_dict`` depends on."""
    if type(one) is not type(other):
        return isinstance(one, Path) and isinstance(other, Path) and one == other
    if isinstance(one, dict):
        keys = zip(one, other, strict=True)
        return all(type(a) is type(b) and a == b and same_values(one[a], other[b]) for a, b in keys)
    if isinstance(one, list | tuple | collections.deque):
        return len(one) == len(other) and all(same_values(a, b) for a, b in zip(one, other, strict=True))
    return repr(one) == repr(other) if isinstance(one, float | complex) else one == other


def test_nan_stays_nan(tmp_path: Path) -> None:
    """Bug: JSON without NaN, so that a NaN in a counter becomes null or an error."""
    assert math.isnan(through_a_file(tmp_path, {"x": math.nan})["x"])


def test_the_order_of_dimensions_in_memory_is_kept() -> None:
    # catches a product with a transposed tensor, as of SOAP's projections, whose last bits differ after a resume
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for tensor in (torch.randn(3, 4).t(), image, torch.randn(2, 3, 4).permute(2, 0, 1), torch.randn(4, 6)[:, ::2]):
        encoded = Encoded({"x": tensor, "again": [tensor]})
        found = decode(json.loads(json.dumps(encoded.tree)), [each.clone().contiguous() for each in encoded.tensors])
        assert len(encoded.tensors) == 1
        assert torch.equal(found["x"], tensor)
        if tensor.stride() != (6, 2):  # it has gaps in its memory
            assert found["x"].stride() == tensor.stride()
    for order in ([0, 0], [0], ["a", 1], None):
        with pytest.raises(CheckpointError, match="order"):
            decode({"P": [0, order]}, [torch.ones(2, 3)])


def test_tied_weights_are_stored_once_and_are_one_tensor_again(tmp_path: Path) -> None:
    """Bug: tied weights become two tensors, which train apart after a resume."""
    weight = torch.randn(100, 10)
    found = through_a_file(tmp_path, {"head": weight, "embedding": weight.detach(), "part": weight[:1]})
    assert found["head"] is found["embedding"]
    assert torch.equal(found["part"], weight[:1])
    names = Encoded({"head": weight, "embedding": weight.detach(), "part": weight[:1]}).names
    assert names == ["head", "part"]


def test_loaded_tensors_have_memory_of_their_own(tmp_path: Path) -> None:
    """Views of one buffer would keep all of it alive, and bloat whatever is saved from them."""
    found = through_a_file(tmp_path, {"a": torch.ones(3), "b": torch.ones(4)})
    assert found["a"].untyped_storage().nbytes() == 12
    assert found["b"].untyped_storage().nbytes() == 16


def test_names_that_collide(tmp_path: Path) -> None:
    """Bug: two keys with one path in the file, of which one is lost."""
    one, two, three = torch.ones(1), torch.zeros(1), torch.full((1,), 2.0)
    found = through_a_file(tmp_path, {"a.b": one, "a": {"b": two}, "__metadata__": three})
    assert (found["a.b"].item(), found["a"]["b"].item(), found["__metadata__"].item()) == (1.0, 0.0, 2.0)


def test_an_optimizers_state_and_a_modules_versions(tmp_path: Path) -> None:
    """Integer keys; and the versions in a state_dict, by which modules migrate old ones."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    found = through_a_file(tmp_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert found["model"]._metadata == model.state_dict()._metadata
    assert [type(key) for key in found["optimizer"]["state"]] == [int] * 4
    fresh = torch.optim.AdamW(model.parameters())
    fresh.load_state_dict(found["optimizer"])
    for parameter in model.parameters():
        assert torch.equal(fresh.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_a_snapshot_is_of_the_moment(tmp_path: Path) -> None:
    """Training continues during the write: neither tensors nor containers in the file may change with it."""
    weight, plain = torch.ones(200_000), {"steps": [1]}
    saver = Saver(Store(tmp_path))
    saver.save({"weight": weight, "plain": plain}, CheckpointInfo(step=1, run="a"))
    weight.zero_()
    plain["steps"].append(2)
    saver.wait()
    found = load(tmp_path)
    assert found["weight"].min().item() == 1.0
    assert found["plain"] == {"steps": [1]}


def test_numpy_and_subclasses_become_plain() -> None:
    given = {
        "float": np.float64(0.1), "int": np.int32(3), "array": np.arange(3), "enum": Colour.RED,
        "text": np.str_("x"), "default": collections.defaultdict(int, a=1),
    }  # fmt: skip
    encoded = Encoded(given)
    found = decode(json.loads(json.dumps(encoded.tree)), encoded.tensors)
    assert {key: type(value) for key, value in found.items()} == {
        "float": float, "int": int, "array": np.ndarray, "enum": int, "text": str, "default": dict,
    }  # fmt: skip
    assert (found["float"], found["int"], found["enum"], found["text"]) == (0.1, 3, 3, "x")
    assert found["array"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "value",
    [
        object(),
        functools.partial(print),
        len,
        int,
        np.array(["x"]),
        Pair(1, 2),
        torch.empty(2, device="meta"),
        torch.ones(2).to_sparse(),
    ],
    ids=["object", "partial", "function", "class", "numpy text", "named tuple", "meta", "sparse"],
)
def test_what_is_no_data_is_refused_with_its_path(value: object) -> None:
    """Found at the first save, not when somebody wants to resume."""
    with pytest.raises(CheckpointError, match=r"callbacks\.mine\.1"):
        Encoded({"callbacks": {"mine": [0, value]}})


def wrapper() -> Any:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.tensor([math.nan, 1.0]), torch.tensor([-0.0, math.inf]))


def test_a_declared_wrapper_is_read_back_exactly(tmp_path: Path) -> None:
    """Bugs: inner tensors exchanged, lost or of other bits; a wrapper that comes back as a plain tensor."""
    given = wrapper()
    with torch.serialization.safe_globals([type(given)]):
        nested = type(given)(wrapper(), wrapper())
        found = through_a_file(tmp_path, {"state": {"x": given, "tied": given.a, "nested": nested}})["state"]
    assert type(found["x"]) is type(given)
    for mine, theirs in ((found["x"], given), (found["nested"].a, nested.a), (found["nested"].b, nested.b)):
        assert same([mine.a, mine.b], [theirs.a, theirs.b])
    assert found["tied"] is found["x"].a


def test_a_wrapper_that_is_not_declared_is_neither_written_nor_built(tmp_path: Path) -> None:
    """Bug: a file that names any class of the process, and so builds it."""
    given = wrapper()
    with pytest.raises(CheckpointError, match=r"state\.x is a tensor of class .*TwoTensor.*add_safe_globals"):
        Encoded({"state": {"x": given}})
    with torch.serialization.safe_globals([type(given)]):
        encoded = Encoded({"x": given})
    with pytest.raises(CheckpointError, match=r"class .*TwoTensor.*add_safe_globals"):
        decode(encoded.tree, encoded.tensors)
    tree = json.loads(json.dumps(encoded.tree).replace("torch.testing._internal.two_tensor.TwoTensor", "os.system"))
    with pytest.raises(CheckpointError, match=r"class os\.system"):
        decode(tree, encoded.tensors)


def test_a_file_of_the_first_release_is_read() -> None:
    """Bug: another tag, or another form behind it, and all existing checkpoints are lost."""
    tree = {"d": [
        ["none", None], ["list", [1, 2.5, "a"]], ["o", {"o": [["b", 1]], "m": {"d": [["", {"d": [["version", 2]]}]]}}],
        [{"t": [1, 2]}, {"s": [1]}], ["fs", {"fs": ["a"]}], ["q", {"q": [[1, 2], 5]}], ["T", {"T": 0}],
        ["N", {"N": 1}], ["f", {"f": "nan"}], ["c", {"c": ["-0.0", "2.5"]}], ["b", {"b": "AP8="}],
        ["dtype", {"dtype": "bfloat16"}], ["device", {"device": "cpu"}], ["size", {"size": [2, 3]}],
        ["path", {"path": "/x"}],
    ]}  # fmt: skip
    first, second = torch.ones(2), torch.zeros(1)
    ordered = collections.OrderedDict(b=1)
    expected = {
        "none": None, "list": [1, 2.5, "a"], "o": ordered, (1, 2): {1}, "fs": frozenset({"a"}),
        "q": collections.deque([1, 2], 5), "T": first, "N": second.numpy(), "f": math.nan, "c": complex(-0.0, 2.5),
        "b": b"\x00\xff", "dtype": torch.bfloat16, "device": torch.device("cpu"), "size": torch.Size([2, 3]),
        "path": Path("/x"),
    }  # fmt: skip
    found = decode(tree, [first, second])
    assert not list(differences(found, expected))
    assert found["o"]._metadata == {"": {"version": 2}}
    ordered._metadata = found["o"]._metadata  # type: ignore[attr-defined]
    assert Encoded(expected).tree == tree, "and what is written today, the first release reads"


def test_a_container_in_itself_is_refused() -> None:
    """Bug: endless recursion."""
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="itself"):
        Encoded({"x": loop})


def test_objects_among_hyper_parameters_are_kept_as_text() -> None:
    """Bugs: one object among the hyper-parameters makes saving impossible, or disappears without a message; a module
    that saves them in an entry of its own (pytorch-forecasting) is refused, or gets the text as its loss on resume."""
    relu, broken = torch.nn.ReLU(), Broken()
    net = {"act": relu, "width": 3, "all": [relu, (1, len)], "broken": broken}
    given = {
        "hyper_parameters": {"lr": 0.1, "net": net, torch.nn.ReLU(): 1},
        "hparams_type": dict,
        "special": {"act": relu},
    }
    encoded = Encoded(given)
    found = decode(encoded.tree, encoded.tensors)
    expected = {"act": "ReLU()", "width": 3, "all": ["ReLU()", (1, "<built-in function len>")], "broken": "<Broken>"}
    assert found == {"hyper_parameters": {"lr": 0.1, "net": expected, "ReLU()": 1}, "special": {"act": "ReLU()"}}
    names = {each.partition(" ")[0].removeprefix("hyper_parameters.") for each in encoded.omitted}
    assert names == {"net.act", "net.all.1.1", "net.broken", "key"}, "an object that is there twice is named once"
    with pytest.raises(CheckpointError, match=r"state is a torch\.nn\.modules\.activation\.ReLU"):
        Encoded({**given, "state": torch.nn.ReLU()})
    live = decode(encoded.tree, encoded.tensors, lambda path: {"act": relu}[path[-1]])
    assert live["special"]["act"] is relu


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("text", [None, "text", [], [["a"], 3], [[], "text"], [[None], "text"], ["a", "text"]])
def test_an_object_as_text_of_another_form_is_damage(text: Any) -> None:
    with pytest.raises(CheckpointError, match="an object as text cannot be"):
        decode({"r": text}, [])


def test_hyper_parameters_have_their_attributes_when_they_are_loaded_as_data(tmp_path: Path) -> None:
    """Bugs: with Lightning's own checkpoints, a DictConfig makes resuming impossible; as a plain dict it has no
    attributes, and a path, an array or a deque makes a file that weights_only refuses."""
    import argparse

    from lightning.fabric.utilities.data import AttributeDict
    from omegaconf import DictConfig, OmegaConf

    config = OmegaConf.create({"lr": 0.1, "net": {"twice": "${lr}", "layers": [{"n": 1}]}})
    config.net.update({"items": 3, "__deepcopy__": 1})
    whole = Encoded({"hyper_parameters": config, "hparams_type": DictConfig})
    nested = {
        "cfg": config,
        "broken": OmegaConf.create({"x": "${nowhere:}"}),
        "namespace": argparse.Namespace(a=Path("/x")),
        "dict": AttributeDict(b=AttributeDict(c=np.float32(2.0))),
        "others": [np.arange(3), collections.deque([1]), frozenset([2])],
    }
    parts = Encoded({"datamodule_hyper_parameters": nested})
    torch.save([decode(each.tree, each.tensors) for each in (whole, parts)], tmp_path / "file")
    first, second = torch.load(tmp_path / "file", weights_only=True)
    assert first["hparams_type"] == "AttributeDict"
    second = second["datamodule_hyper_parameters"]
    for found in (first["hyper_parameters"], second["cfg"]):
        assert found == {**config, "net": {**config.net, "layers": [{"n": 1}]}}
        assert found.net.twice == found["net"]["twice"] == 0.1
        assert found.net.layers[0].n == 1
        assert callable(found.net.items)
        copy.deepcopy(found)
    assert (second["broken"].x, second["namespace"].a, second["dict"].b.c) == ("${nowhere:}", "/x", 2)
    assert second["others"] == [[0, 1, 2], [1], {2}]


def test_other_tools_can_read_the_tensors(tmp_path: Path) -> None:
    """Bug: a file that is not of the safetensors format, or with other names."""
    safetensors = pytest.importorskip("safetensors.torch")
    saver = Saver(Store(tmp_path))
    saver.save(
        {"state_dict": {"net.weight": torch.ones(2, 2), "odd": torch.ones(3, dtype=torch.int8)}},
        CheckpointInfo(step=1, run="a"),
    )
    saver.wait()
    found = safetensors.load_file(next(tmp_path.glob("*/tensors.safetensors")))
    assert torch.equal(found["state_dict.net.weight"], torch.ones(2, 2))
    assert torch.equal(found["state_dict.odd"], torch.ones(3, dtype=torch.int8))


def test_a_dtype_that_the_format_lacks_is_stored_as_bytes(tmp_path: Path) -> None:
    """Bug: complex128, which safetensors lacks, is refused or loses precision."""
    assert torch.equal(through_a_file(tmp_path, {"x": TENSORS["complex128"]})["x"], TENSORS["complex128"])
