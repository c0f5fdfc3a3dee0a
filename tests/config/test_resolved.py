"""A composed config as plain values."""

import pytest
from omegaconf import OmegaConf

from stabletrain import AccumulateScheduled
from stabletrain.config.problems import ConfigError
from stabletrain.config.resolved import resolve_once


def test_keys_that_are_whole_numbers() -> None:
    """Bugs: a schedule by steps cannot be given on the command line, where Hydra reads 0 as a number and takes no key
    in quotes; one of two keys that read the same is lost."""
    config = OmegaConf.create({"a": [{"schedule": {0: 1, 1000: {5: 4}, "1e9tok": 8}}]})
    assert resolve_once(config) == {"a": [{"schedule": {"0": 1, "1000": {"5": 4}, "1e9tok": 8}}]}
    positions = [AccumulateScheduled(each)._positions for each in ({"0": 1, "1000": 4}, {0: 1, 1000: 4})]
    assert positions[0] == positions[1]
    for keys in ({0: 1, "0": 2}, {True: 1}, {0.5: 1}):
        with pytest.raises(ConfigError, match="expected text as a key"):
            resolve_once(OmegaConf.create({"a": keys}))
