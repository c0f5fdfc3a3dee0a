"""Mistakes about the strategy are one message with the config key, before a run is opened."""

import pytest

from stabletrain.config.compose import compose
from stabletrain.config.validate import check_keys
from stabletrain.launch.checks import check_config
from stabletrain.settings import speak_of_keys

TWO = ["launch=torchrun", "logger=none", "plugins/checkpoints=none"]


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        ([], None, ""),
        (["strategy.units=[Block,Linear]"], None, ""),
        (["strategy.units=[Blok]"], "strategy.units", "did you mean 'Block'"),
        (["strategy.unit=[Block]"], "strategy.unit", "no argument 'unit'; did you mean 'units'"),
        (["strategy.replicate=3"], "strategy.replicate", "must divide the number of processes, got 3 for 2"),
        (["strategy.gather=bf16"], "strategy.gather", "needs autocast to bf16"),
        (["strategy.gather=bf16", "precision=bf16_mixed"], None, ""),
        (["strategy.timeout=0"], "strategy.timeout", "must be seconds > 0"),
        (["strategy.also=[speak]"], "strategy.also", "has no method 'speak'"),
        (["trainer.strategy=ddp"], "trainer.strategy", "strategy sets it too"),
        (["plugins/averaging=ema"], "plugins", "EMAWeightAveraging copies the whole module"),
    ],
)
def test_mistakes(words: list[str], key: str | None, says: str) -> None:
    """Bugs: a typing error that trains one group; processes that start and then fail, each with a traceback."""
    composed = compose("char_gpt", ["strategy=fsdp2", *TWO, *words])
    assert check_keys(composed) == []
    with speak_of_keys():
        problems = check_config(composed.config)
    assert [problem.key for problem in problems] == ([] if key is None else [key])
    assert all(says in problem.text for problem in problems)
