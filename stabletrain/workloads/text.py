"""Convert characters to tokens and back, and read text files."""

import gzip
import hashlib
import io
import string
import zlib
from pathlib import Path

import torch
from torch import Tensor

from stabletrain.workloads.errors import DataError

VOCABULARY: str = "\n !\"&'()*,-./0123456789:;?@" + string.ascii_uppercase + "[]_" + string.ascii_lowercase + "{}"
"""The 84 characters of the distributed text in code-point order; a character's index is its token."""

_UNKNOWN = 255
_LARGEST = 2**30
"""Bytes of a text; it is held in memory several times while it is converted."""
_TOKEN_OF_BYTE = torch.full((256,), _UNKNOWN, dtype=torch.uint8)
_TOKEN_OF_BYTE[list(VOCABULARY.encode())] = torch.arange(len(VOCABULARY), dtype=torch.uint8)
_BYTE_OF_TOKEN = torch.tensor(list(VOCABULARY.encode()), dtype=torch.uint8)


def encode(text: str) -> Tensor:
    """Return the tokens of a text.

    Args:
        text: characters of `VOCABULARY` only.

    Returns:
        uint8 tensor with one token per character.

    Raises:
        DataError: if a character is not in the vocabulary.

    >>> encode("O Romeo").tolist()
    [41, 1, 44, 70, 68, 60, 70]
    >>> decode(encode("O Romeo"))
    'O Romeo'
    """
    # one byte per character, also outside ASCII (not in the vocabulary), so that indices match those of the text
    raw = text.encode() if text.isascii() else bytes(min(ord(c), _UNKNOWN) for c in text)
    if not raw:  # frombuffer raises for an empty buffer
        return torch.empty(0, dtype=torch.uint8)
    tokens = _TOKEN_OF_BYTE[torch.frombuffer(bytearray(raw), dtype=torch.uint8).int()]
    unknown = tokens == _UNKNOWN
    if unknown.any():
        index = int(unknown.nonzero()[0])
        raise DataError(
            f"character {text[index]!r} at position {index} is not one of the {len(VOCABULARY)} characters of the "
            f"vocabulary (expected letters, digits, space, line feed and {_punctuation()!r}); replace it in the text"
        )
    return tokens


def decode(tokens: Tensor) -> str:
    """Return the text of tokens; the inverse of `encode`.

    Args:
        tokens: 1-D integer tensor, each in 0 .. 83.

    >>> decode(torch.tensor([73, 70, 74, 60]))
    'rose'
    """
    return bytes(_BYTE_OF_TOKEN[tokens.cpu().long()].tolist()).decode("ascii")


def read_text(path: Path, sha256: str | None) -> tuple[str, str]:
    """Read and check a text file, decompressed if its name ends in `.gz`.

    Args:
        path: of the file, in UTF-8.
        sha256: expected digest of the uncompressed bytes; None: not checked.

    Returns:
        The text, and the sha256 of its uncompressed bytes.

    Raises:
        DataError: if the file is missing, empty, truncated, not UTF-8, or has another digest.
    """
    remedy = "set data.path to a readable .txt or .txt.gz file, or to null for the text distributed with stabletrain"
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # reading a named pipe or a device has no end
            raise DataError(f"data file {path}: expected a file, got a pipe or a device; {remedy}")
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data file {path}: expected a readable file, got {reason}; {remedy}") from error
    if path.suffix == ".gz" and raw:
        try:
            with gzip.open(io.BytesIO(raw)) as unpacked:
                raw = unpacked.read(_LARGEST + 1)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"data file {path}: expected a whole gzip file, got a truncated or damaged one of {len(raw)} bytes "
                f"({error}); download or write it again, or {remedy}"
            ) from error
    if len(raw) > _LARGEST:
        raise DataError(f"data file {path}: expected at most {_LARGEST // 2**20} MiB of text, got more; {remedy}")
    if not raw:
        raise DataError(f"data file {path}: expected text, got an empty file; {remedy}")
    digest = hashlib.sha256(raw).hexdigest()
    if sha256 is not None and digest != sha256:
        raise DataError(
            f"data file {path}: expected sha256 {sha256} of the uncompressed text, got {digest} ({len(raw)} bytes): "
            f"the file is truncated or was changed; restore it (reinstall stabletrain if it is the distributed one), "
            f"correct data.sha256, or {remedy}"
        )
    try:
        return raw.decode("utf-8"), digest
    except UnicodeDecodeError as error:
        raise DataError(f"data file {path}: expected UTF-8 text, got {error}; convert it, or {remedy}") from error


def _punctuation() -> str:
    return "".join(c for c in VOCABULARY if not c.isalnum() and not c.isspace())
