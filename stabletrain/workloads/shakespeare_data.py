import re
from math import ceil
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from stabletrain.errors import UserError
from stabletrain.workloads import text
from stabletrain.workloads.arguments import MOST_WORKERS, whole
from stabletrain.workloads.batches import Windows, as_gathered
from stabletrain.workloads.errors import DataError

_SHIPPED = Path(__file__).parent / "data" / "shakespeare.txt.gz"
_SHIPPED_SHA256 = "e1d2e18ac43deb31b3e5d9717ab4783be810a9c5cd0e7cb2c83797d39757bac8"
_VALIDATION_SHARE = 0.1


class ShakespeareData(L.LightningDataModule):
    """Windows of the works of Shakespeare, or of another text in the same 84 characters.

    A batch is one int64 tensor (batch_size, context + 1): inputs are `batch[:, :-1]`, targets `batch[:, 1:]`. The last
    10 % of the text are for validation and do not overlap with the training part.

    Args:
        path: `.txt` or `.txt.gz` file in UTF-8; None: the text distributed with stabletrain.
        sha256: digest of the uncompressed text; None: checked only if path is None, against the distributed text's.
        context: number of tokens of an input, at least 1.
        batch_size: windows per batch and process, at least 1.
        validation_windows: maximum number of windows in one validation, at least 1.
        seed: of the windows' positions; the order within an epoch is the loader's.
        shuffle: False: every epoch has the same order, so that batch t is a function of (seed, t).
        workers: processes of the loader; 0 is fastest here, since a batch is one gather operation.

    Raises:
        DataError: in `setup`, if the file is missing, empty, truncated, too short or has other characters.
    """

    data_option = "shakespeare"

    def __init__(
        self,
        path: str | None = None,
        sha256: str | None = None,
        context: int = 64,
        batch_size: int = 32,
        validation_windows: int = 1024,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 0,
    ) -> None:
        super().__init__()
        for key, value, least, most in (
            ("context", context, 1, 1_000_000),
            ("batch_size", batch_size, 1, 1_000_000),
            ("validation_windows", validation_windows, 1, 10**9),
            ("workers", workers, 0, MOST_WORKERS),
            ("seed", seed, -(2**63), 2**63 - 1),
        ):
            whole(f"data.{key}", value, least, most)
        if path is not None and not path.strip():
            raise UserError(f"data.path: expected a file, or null for the text of stabletrain, got {path!r}")
        if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
            raise UserError(f"data.sha256: expected 64 hexadecimal digits in lower case, or null, got {sha256!r}")
        self.save_hyperparameters(logger=False)
        self.path, self.sha256, self.context, self.batch_size = path, sha256, context, batch_size
        self.validation_windows, self.seed, self.shuffle, self.workers = validation_windows, seed, shuffle, workers
        self._digest: str | None = None
        self._split: tuple[Windows, Windows] | None = None

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return len(text.VOCABULARY)

    def encode(self, characters: str) -> Tensor:
        """Return the tokens of a text; raises DataError for a character outside the vocabulary."""
        return text.encode(characters)

    def decode(self, tokens: Tensor) -> str:
        """Return the text of a 1-D tensor of tokens."""
        return text.decode(tokens)

    @property
    def samples_per_batch(self) -> int:
        """Samples in a training batch of one process, which plugins may read before the data are loaded."""
        return self.batch_size

    def fingerprint(self) -> dict[str, str]:
        """Name and digest of the text, for the record of a run: the sha256 of its uncompressed bytes."""
        self._windows()
        assert self._digest is not None
        return {"name": "shakespeare" if self.path is None else Path(self.path).name, "digest": self._digest}

    def setup(self, stage: str | None = None) -> None:
        """Read, check and split the text, once for all stages."""
        self._windows()

    def _windows(self) -> tuple[Windows, Windows]:
        if self._split is not None:
            return self._split
        path = _SHIPPED if self.path is None else Path(self.path).absolute()
        expected = _SHIPPED_SHA256 if self.path is None and self.sha256 is None else self.sha256
        characters, self._digest = text.read_text(path, expected)
        try:
            tokens = text.encode(characters)
        except DataError as error:
            raise DataError(f"data file {path}: {error}") from error
        length = self.context + 1
        cut = len(tokens) - int(len(tokens) * _VALIDATION_SHARE)
        if len(tokens) - cut < 2 * length:
            raise DataError(
                f"data file {path}: expected at least {ceil(2 * length / _VALIDATION_SHARE)} characters for "
                f"data.context={self.context}, got {len(tokens)}; use a longer text or a smaller data.context"
            )
        # the validation windows are the same for every seed, so that runs can be compared
        self._split = Windows(tokens[:cut], length, self.seed), Windows(tokens[cut:], length, seed=0)
        return self._split

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return batches of training windows; an incomplete last batch is dropped."""
        train, _ = self._windows()
        if len(train) < self.batch_size:
            raise DataError(
                f"data.batch_size: expected at most the {len(train)} windows of the training text, "
                f"got {self.batch_size}; lower it or use a longer text"
            )
        return DataLoader(
            train,
            self.batch_size,
            shuffle=self.shuffle,
            drop_last=True,
            num_workers=self.workers,
            collate_fn=as_gathered,
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return batches of the validation windows in a fixed order."""
        _, validation = self._windows()
        count = min(self.validation_windows, len(validation))
        return DataLoader(
            Subset(validation, range(count)),
            self.batch_size,
            num_workers=self.workers,
            collate_fn=as_gathered,
            # without its own generator, a loader draws from the global one at each start, so that a validation would
            # change the training's random numbers
            generator=torch.Generator(),
        )
