import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stabletrain.extras import require
from stabletrain.runtime.records.checksums import checksum
from stabletrain.workloads.arguments import MOST_WORKERS, whole
from stabletrain.workloads.batches import Examples, as_gathered

_VALIDATION_SHARE = 0.2
_SPLIT_SEED = 0
_LARGEST_PIXEL = 16.0


class DigitsData(L.LightningDataModule):
    """1797 handwritten digits of 8 x 8 pixels (scikit-learn's `load_digits`; Alpaydin and Kaynak, UCI 1998).

    A batch is (images (batch, 1, 8, 8) float in 0 .. 1, labels (batch,) int64). The split is the same in every run:
    1437 digits for training and 360 for validation, stratified by class.

    Args:
        batch_size: digits per batch and process, 1 to 1437.
        workers: processes of the loader; 0 is fastest for these data.
    """

    data_option = "digits"

    def __init__(self, batch_size: int = 64, workers: int = 0) -> None:
        super().__init__()
        require("sklearn", "data=digits")
        whole("data.batch_size", batch_size, 1, 1437)
        whole("data.workers", workers, 0, MOST_WORKERS)
        self.save_hyperparameters(logger=False)
        self.batch_size, self.workers = batch_size, workers
        self._split: tuple[Examples, Examples] | None = None

    @property
    def samples_per_batch(self) -> int:
        """Samples in a training batch of one process, which plugins may read before the data are loaded."""
        return self.batch_size

    def fingerprint(self) -> dict[str, str]:
        """Name and digest of the digits, for the record of a run."""
        train, validation = self._examples()
        tensors = [tensor for part in (train, validation) for tensor in (part.inputs, part.labels)]
        return {"name": "digits", "digest": checksum(tensors)}

    def setup(self, stage: str | None = None) -> None:
        """Load and split the digits, once for all stages."""
        self._examples()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return shuffled training batches. An incomplete last batch is dropped: batch norm needs several digits."""
        train, _ = self._examples()
        return DataLoader(
            train, self.batch_size, shuffle=True, drop_last=True, num_workers=self.workers, collate_fn=as_gathered
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return validation batches in a fixed order."""
        _, validation = self._examples()
        return DataLoader(
            validation,
            self.batch_size,
            num_workers=self.workers,
            collate_fn=as_gathered,
            # its own generator, so that a validation does not draw from the global one (see ShakespeareData)
            generator=torch.Generator(),
        )

    def _examples(self) -> tuple[Examples, Examples]:
        if self._split is None:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split

            pixels, labels = load_digits(return_X_y=True)
            chosen = train_test_split(
                range(len(labels)), test_size=_VALIDATION_SHARE, random_state=_SPLIT_SEED, stratify=labels
            )
            images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / _LARGEST_PIXEL
            targets = torch.tensor(labels, dtype=torch.int64)
            train, validation = (Examples(images[sorted(part)], targets[sorted(part)]) for part in chosen)
            self._split = train, validation
        return self._split
