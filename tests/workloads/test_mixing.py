import pytest
import torch
import torch.nn.functional as F

from stabletrain.workloads import DigitsCNN
from stabletrain.workloads.mixing import mix

IMAGES = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 8, 8).contiguous()  # each image has its own grey
LABELS = torch.arange(6)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (1.0, 1.0), (1e-30, 0.0), (500.0, 0.0)])
def test_the_share_of_a_label_is_that_of_its_image(mixup: float, cutmix: float) -> None:
    """Bugs: labels weighted by the share that was drawn, not by the pixels; shares exchanged; NaN for a tiny alpha."""
    for seed in range(50):
        torch.manual_seed(seed)
        mixed = mix(IMAGES, LABELS, mixup, cutmix)
        assert 0.0 <= mixed.share <= 1.0
        expected = mixed.share * mixed.labels + (1.0 - mixed.share) * mixed.others
        torch.testing.assert_close(mixed.images.mean((1, 2, 3)), expected, rtol=0, atol=1e-5)


def test_mixup_averages_and_cutmix_replaces_a_rectangle() -> None:
    """Bugs: CutMix of pixels here and there, or of another rectangle in each image; mixup that replaces."""
    for seed in range(50):
        torch.manual_seed(seed)
        mixed = mix(IMAGES, LABELS, 0.0, 1.0)
        replaced = (mixed.images != IMAGES)[mixed.others != LABELS].flatten(1, 2)
        assert (replaced == replaced[0]).all()
        rows, columns = replaced[0].any(1), replaced[0].any(0)
        assert torch.equal(replaced[0], rows[:, None] & columns)
        for side in (rows, columns):
            assert side.int().diff().abs().sum() <= 2  # one stretch
        assert (mix(IMAGES, LABELS, 1.0, 0.0).images.flatten(1).std(1) < 1e-6).all()


def test_the_loss_is_that_of_soft_labels() -> None:
    """Bug: the second label is left out, or smoothing applies to one of both."""
    torch.manual_seed(0)
    mixed, logits = mix(IMAGES, LABELS, 1.0, 0.0), torch.randn(6, 6)
    soft = mixed.share * F.one_hot(mixed.labels, 6) + (1 - mixed.share) * F.one_hot(mixed.others, 6)
    expected = F.cross_entropy(logits, soft, label_smoothing=0.1)
    torch.testing.assert_close(mixed.cross_entropy(logits, 0.1), expected)


def test_it_changes_training_and_not_validation() -> None:
    """Bugs: an option does nothing; images are mixed in the validation; switched off, it draws random numbers."""
    batch = (torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8))

    def losses(**options: float) -> tuple[torch.Tensor, torch.Tensor, bool]:
        torch.manual_seed(0)
        model = DigitsCNN(dropout=0.0, max_shift=0, **options).eval()
        before = torch.get_rng_state()
        found = model.training_step(batch, 0), model.validation_step(batch, 0)["loss"]
        return *found, torch.equal(torch.get_rng_state(), before)

    plain, validation, draws_nothing = losses()
    assert torch.equal(plain, validation)
    assert draws_nothing
    for options in ({"mixup": 0.4}, {"cutmix": 1.0}, {"label_smoothing": 0.1}):
        training, unchanged, _ = losses(**options)
        assert not torch.equal(training, plain)
        assert torch.equal(unchanged, validation)
