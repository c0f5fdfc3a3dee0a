import gzip
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stabletrain.workloads import DataError, ShakespeareData
from stabletrain.workloads.batches import Windows, as_gathered
from stabletrain.workloads.text import VOCABULARY, decode, encode

LINE = "O Romeo, Romeo, wherefore art thou Romeo?\n"


@pytest.fixture(scope="module")
def shipped() -> ShakespeareData:
    data = ShakespeareData(context=16, batch_size=8, validation_windows=20)
    data.setup("fit")
    return data


def write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def test_vocabulary_round_trip() -> None:
    """Catches two characters with one token, or a table in another order than the vocabulary."""
    assert len(VOCABULARY) == 84
    assert list(VOCABULARY) == sorted(set(VOCABULARY))
    assert torch.equal(encode(VOCABULARY), torch.arange(84, dtype=torch.uint8))
    assert decode(encode(LINE)) == LINE
    assert decode(encode("")) == ""


@pytest.mark.parametrize("stranger", ["é", "€", "\r", "\t", "\xff", "#"])
def test_a_foreign_character_is_named_with_its_position(stranger: str) -> None:
    """Catches a silent replacement, and a position counted in bytes."""
    with pytest.raises(DataError, match="position 2 "):
        encode("ab" + stranger + "c")


def test_the_shipped_text_uses_the_whole_vocabulary(shipped: ShakespeareData) -> None:
    """Catches a vocabulary that is not the text's, hence a model with dead tokens."""
    train, validation = shipped._windows()
    tokens = torch.cat([train._windows[:, 0], validation._windows[:, 0]])
    assert len(tokens.unique()) == shipped.vocab_size == 84


@pytest.mark.parametrize("name", ["missing.txt", "missing.txt.gz"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    """Catches a bare FileNotFoundError without the key to change."""
    with pytest.raises(DataError, match=rf"{name}.*got No such file.*data\.path"):
        ShakespeareData(path=str(tmp_path / name)).setup()


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    """Catches an IsADirectoryError that names no key."""
    with pytest.raises(DataError, match=r"Is a directory.*data\.path"):
        ShakespeareData(path=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b""), ("a.txt.gz", b""), ("b.txt.gz", gzip.compress(b"", mtime=0))]
)
def test_an_empty_file(tmp_path: Path, name: str, content: bytes) -> None:
    """Catches an IndexError from an empty tensor."""
    with pytest.raises(DataError, match=rf"{name}: expected text, got an empty file.*data\.path"):
        ShakespeareData(path=write(tmp_path, name, content)).setup()


@pytest.mark.parametrize("kept", [5, 15, 60, -9, -1])
def test_a_truncated_gzip_file(tmp_path: Path, kept: int) -> None:
    """Catches training on the part of the text that could be unpacked, wherever the file was cut."""
    whole = gzip.compress((LINE * 500).encode())
    with pytest.raises(DataError, match=r"a\.txt\.gz: expected a whole gzip file, got a truncated.*write it again"):
        ShakespeareData(path=write(tmp_path, "a.txt.gz", whole[:kept])).setup()


def test_a_damaged_gzip_file(tmp_path: Path) -> None:
    """Catches a flipped bit that zlib reports in its own way."""
    whole = bytearray(gzip.compress((LINE * 500).encode()))
    for index in range(10, len(whole)):
        damaged = bytes(whole[:index]) + bytes([whole[index] ^ 0x10]) + bytes(whole[index + 1 :])
        with pytest.raises(DataError, match=r"a\.txt\.gz"):
            ShakespeareData(path=write(tmp_path, "a.txt.gz", damaged)).setup()


def test_a_truncated_plain_file_with_a_digest(tmp_path: Path) -> None:
    """Catches a digest that is not compared."""
    whole = (LINE * 500).encode()
    digest = hashlib.sha256(whole).hexdigest()
    ShakespeareData(path=write(tmp_path, "a.txt", whole), sha256=digest, context=16).setup()
    with pytest.raises(DataError, match=rf"a\.txt: expected sha256 {digest}.*truncated or was changed.*data\.sha256"):
        ShakespeareData(path=write(tmp_path, "a.txt", whole[:-1]), sha256=digest, context=16).setup()


def test_the_shipped_file_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches a shipped file that is exchanged or cut in packaging and trains all the same."""
    changed = write(tmp_path, "shakespeare.txt.gz", gzip.compress((LINE * 500).encode()))
    monkeypatch.setattr("stabletrain.workloads.shakespeare_data._SHIPPED", Path(changed))
    with pytest.raises(DataError, match=r"expected sha256 e1d2e18a.*reinstall stabletrain"):
        ShakespeareData().setup()


def test_other_contents_are_refused(tmp_path: Path) -> None:
    """Catches text in another encoding, with other characters, or too short for one window."""
    with pytest.raises(DataError, match=r"latin\.txt: expected UTF-8"):
        ShakespeareData(path=write(tmp_path, "latin.txt", b"caf\xe9" * 999)).setup()
    with pytest.raises(DataError, match=r"odd\.txt: character 'é' at position 3"):
        ShakespeareData(path=write(tmp_path, "odd.txt", "café".encode() * 999)).setup()
    with pytest.raises(
        DataError, match=r"short\.txt: expected at least 340 characters.*got 339.*smaller data\.context"
    ):
        ShakespeareData(path=write(tmp_path, "short.txt", b"a" * 339), context=16).setup()
    ShakespeareData(path=write(tmp_path, "enough.txt", b"a" * 340), context=16).setup()


def test_too_large_a_batch_is_named(tmp_path: Path) -> None:
    """Catches an epoch of no batches, which Lightning skips without an error."""
    data = ShakespeareData(path=write(tmp_path, "a.txt", (LINE * 9).encode()), context=16)
    with pytest.raises(DataError, match=r"data\.batch_size: expected at most the 20 windows"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"data\.batch_size"):
        ShakespeareData(batch_size=0)


def test_training_and_validation_share_no_character(shipped: ShakespeareData) -> None:
    """Catches windows that reach over the cut, and a validation part that is not the last tenth."""
    train, validation = shipped._windows()
    trained, held_out = len(train._windows) + 16, len(validation._windows) + 16
    assert trained + held_out == 5_057_323
    assert held_out == 505_732
    assert int(train.starts.min()) >= 0
    assert int(train.starts.max()) + 17 <= trained
    assert int(validation.starts.max()) + 17 <= held_out
    assert train._windows.storage_offset() == 0
    assert validation._windows.storage_offset() == trained


def test_a_batch_is_the_naive_gather_of_its_items(shipped: ShakespeareData) -> None:
    """Catches a vectorised gather that is off by one, and an item that is not a stretch of the text."""
    train, _ = shipped._windows()
    indices = [0, len(train) - 1, 17, 17, 4]
    batch = as_gathered(train.__getitems__(indices))
    assert torch.equal(batch, torch.stack([train[i] for i in indices]))
    assert batch.dtype == torch.int64
    text = decode(train._windows[:, 0])
    start = int(train.starts[17])
    assert decode(train[17]) == text[start : start + 17]


@pytest.mark.parametrize("length", range(4, 60))
def test_windows_stay_inside_any_text(length: int) -> None:
    """Catches a last window that runs over the end for some length of text."""
    for seed in range(5):
        windows = Windows(torch.arange(length), 2 + length % 3, seed)
        assert all(
            torch.equal(windows[i], windows.starts[i] + torch.arange(2 + length % 3)) for i in range(len(windows))
        )


def test_items_depend_on_seed_and_index_only() -> None:
    """Catches windows drawn from the global generator: a resumed run would see other data."""
    tokens = torch.arange(10_000)
    before = torch.random.get_rng_state()
    first = Windows(tokens, 17, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(first.starts, Windows(tokens, 17, seed=1).starts)
    assert not torch.equal(first.starts, Windows(tokens, 17, seed=2).starts)


def test_without_shuffle_a_batch_is_a_function_of_seed_and_step() -> None:
    """Catches a fixed order that follows the text, or that a new process does not repeat."""
    data = ShakespeareData(context=16, batch_size=8, shuffle=False)
    train, _ = data._windows()
    for step, batch in zip(range(3), data.train_dataloader(), strict=False):
        assert torch.equal(batch, train.__getitems__(range(8 * step, 8 * step + 8)))
    assert not torch.equal(train.starts, train.starts.sort().values)


def test_validation_is_fixed_and_draws_no_global_random_number(shipped: ShakespeareData) -> None:
    """Catches validation windows that differ between runs, and a loader that disturbs the training."""
    other = ShakespeareData(context=16, batch_size=8, validation_windows=20, seed=9)
    before = torch.random.get_rng_state()
    batches = list(shipped.val_dataloader())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [len(b) for b in batches] == [8, 8, 4]
    assert all(torch.equal(a, b) for a, b in zip(batches, other.val_dataloader(), strict=True))


def test_loader_processes_give_the_same_batches() -> None:
    """Catches a dataset or a collate that cannot be sent to a loader process."""
    alone, helped = (ShakespeareData(context=16, batch_size=8, shuffle=False, workers=n) for n in (0, 1))
    pairs = zip(range(3), alone.train_dataloader(), helped.train_dataloader(), strict=False)
    assert all(torch.equal(a, b) for _, a, b in pairs)


def test_importing_the_package_is_light() -> None:
    """Catches an import of torch or lightning by `import stabletrain.workloads`."""
    code = (
        "import sys, stabletrain.workloads as w; print([m for m in ('torch', 'lightning') if m in sys.modules], dir(w))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("[] ")
    assert "CharGPT" in out
