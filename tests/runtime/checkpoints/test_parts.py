"""Who writes which part, and what a list of parts that somebody else has written may hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stabletrain.runtime.checkpoints import (
    CheckpointError,
    CheckpointInfo,
    Store,
    durable,
    load,
    pieces,
    tensor_file,
    verify,
)
from stabletrain.runtime.checkpoints.encoding import Encoded
from stabletrain.runtime.checkpoints.manifest import STATE, part_file
from stabletrain.runtime.checkpoints.optimizer_keys import by_number, for_parameters
from stabletrain.runtime.checkpoints.parts import Held, assign
from stabletrain.runtime.checkpoints.pieces import Piece
from stabletrain.runtime.checkpoints.regions import Box
from stabletrain.runtime.checkpoints.store import state_text

NAN = torch.tensor([0.0, float("nan"), -0.0, float("inf"), 1.0]).repeat(2, 1)


def write(folder: Path, change: Any = lambda index: index) -> Path:
    """A checkpoint of a 2 x 5 tensor, whose rows are in the files of two ranks; the list of blocks may be changed."""
    store, encoded = Store(folder), Encoded({"a": NAN})
    place = store.begin(1)
    blocks = {part_file(i, 2): [Piece("a", Box((i, 0), (1, 5)))] for i in range(2)}
    files = {
        name: durable.write_file(place / name, tensor_file.chunks([each.entry for each in own], [NAN[i : i + 1]]))
        for i, (name, own) in enumerate(blocks.items())
    }
    index = change(pieces.index_of(blocks, encoded.names))
    files[STATE] = durable.write_file(place / STATE, [state_text(encoded.tree, encoded.names, encoded.tensors, index)])
    return store.commit(place, CheckpointInfo(step=1, run="a", world_size=2), files)


def test_parts_make_up_the_whole(tmp_path: Path) -> None:
    """Bug: NaN, infinity or the sign of a zero is lost where parts are put together."""
    path = write(tmp_path)
    assert json.loads((path / "manifest.json").read_text())["format"] == 2
    assert torch.equal(load(path)["a"].view(torch.int32), NAN.view(torch.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: None, "not that of the manifest"),
        (lambda index: {}, "not that of the manifest"),
        (lambda index: dict.fromkeys(index, 3), "list of a file's blocks is damaged"),
        (lambda index: {**index, part_file(0, 2): []}, "damaged header|too few"),
        (lambda index: {**index, part_file(0, 2): [[0, [0, 0]]]}, "blocks is damaged"),
        (lambda index: {**index, part_file(0, 2): [[1, [0, 0], [1, 5]]]}, "blocks is damaged"),
        (lambda index: {**index, part_file(0, 2): [[0, [0, -1], [1, 5]]]}, "block of 'a' is damaged"),
        (lambda index: {**index, part_file(0, 2): [[0, [0], [1, 5]]]}, "block of 'a' is damaged"),
        (lambda index: {**index, part_file(0, 2): [[0, [0, True], [1, 5]]]}, "block of 'a' is damaged"),
        (lambda index: {**index, part_file(0, 2): [[0, [2, 0], [1, 5]]]}, "not within the tensor"),
        (lambda index: {**index, part_file(0, 2): [[0, [1, 0], [1, 5]]]}, "damaged header"),
        (lambda index: {**index, part_file(0, 2): index[part_file(0, 2)] * 2}, "damaged header"),
    ],
)
def test_a_damaged_list_of_parts_is_one_message(tmp_path: Path, change: Any, message: str) -> None:
    """Bugs: a list with a right checksum and a wrong content ends in a traceback, or in left-over memory."""
    with pytest.raises(CheckpointError, match=message):
        verify(write(tmp_path, change))


def test_only_files_with_wanted_parts_are_read(tmp_path: Path) -> None:
    """Bug: a rank reads the files of all ranks, and fails for one that it does not need."""
    from stabletrain.runtime.checkpoints.loading import read
    from stabletrain.runtime.checkpoints.placing import Target

    path = write(tmp_path)
    (path / part_file(0, 2)).write_bytes(bytes((path / part_file(0, 2)).stat().st_size))
    wanted = {0: Target((((1, 2),), ((1, 4),)), lambda local: local)}
    found = read(path, place=lambda tree, kinds: wanted).checkpoint["a"]
    assert torch.equal(found.view(torch.int32), NAN[1:2, 1:4].contiguous().view(torch.int32))
    with pytest.raises(CheckpointError, match="damaged header"):
        verify(path)


def test_parts_that_overlap_or_are_missing_are_an_error() -> None:
    """Bugs: a checkpoint without some rows; ranks with different models write one checkpoint."""

    def rows(start: int, end: int, dtype: torch.dtype = torch.float32) -> dict[str, Held]:
        return {"a": Held(dtype, (4,), (((start, end),),))}

    assert assign([rows(0, 2), rows(2, 4)]) == [{"a"}, {"a"}]
    assert assign([rows(0, 4), rows(4, 4)]) == [{"a"}, set()]
    for other in (rows(1, 4), rows(3, 4)):
        with pytest.raises(CheckpointError, match="overlap or are missing"):
            assign([rows(0, 2), other])
    with pytest.raises(CheckpointError, match="different models"):
        assign([rows(0, 2), rows(2, 4, torch.float64)])


def test_optimizer_states_go_to_the_parameters_of_their_names() -> None:
    """Bugs: groups in another order within themselves get each other's moments; other parameters are not noticed."""
    state = {"state": {"b": {"m": 1}}, "param_groups": [{"lr": 1, "params": ["a", "b"]}, {"lr": 2, "params": ["c"]}]}
    assert by_number(state)["state"] == {1: {"m": 1}}
    found = for_parameters(state, [["b", "a"], ["c"]])
    assert found["state"] == {0: {"m": 1}}
    assert [group["params"] for group in found["param_groups"]] == [[0, 1], [2]]
    assert for_parameters(by_number(state), [["x", "y"], ["z"]])["state"] == {1: {"m": 1}}
    for groups, message in (
        ([["a", "b", "c"]], "1 parameter groups, and the checkpoint's had 2"),
        ([["a"], ["c"]], r"\(b is"),
    ):
        with pytest.raises(CheckpointError, match=message):
            for_parameters(state, groups)
