"""Generated command lines, right and wrong, through composing and validation, in this process."""

import re
import time

import pytest
from config_lines import config_lines

from stabletrain.config.compose import compose, expand
from stabletrain.config.problems import ConfigError, Problem
from stabletrain.config.validate import check

LINES = config_lines(seed=8, count=1500)
QUICK, MORE = LINES[:60], LINES[60:160]
"""benchmarks/hostile.py tries 1,500, and trains what is accepted."""
_SECONDS = 20
"""For one line; it takes about 0.4 s, but the machine may be shared, and the first imports Lightning."""


def problems_of(line: list[str]) -> list[Problem]:
    try:
        jobs = expand(line[0], line[1:], multirun=False)
        return [problem for recipe, overrides in jobs for problem in check(compose(recipe, overrides))]
    except ConfigError as error:
        return list(error.problems)


def names_a_key(text: str, line: list[str]) -> bool:
    """Whether a message names a key of the line, or the beginning of one, or there are no keys in it."""
    for word in line[1:]:
        key = re.split(r"[./@]", word.lstrip("+~").partition("=")[0])
        if not any(key) or any(joint.join(key[:n]) in text for n in range(1, len(key) + 1) for joint in "./@"):
            return True
    return False


def test_lines_are_distinct_and_a_function_of_the_seed() -> None:
    """Bug: a failure in acceptance that cannot be repeated."""
    assert len({tuple(line) for line in LINES}) == 1500
    assert config_lines(seed=8, count=200) == LINES[:200]
    assert config_lines(seed=9, count=200) != LINES[:200]


def refused_in_the_dark(line: list[str]) -> bool:
    """Whether there are messages, and none names a key of the line: another key may refer to one of them."""
    problems = problems_of(line)
    assert all(len(str(problem).splitlines()) == 1 for problem in problems)
    return bool(problems) and not any(names_a_key(str(problem), line) for problem in problems)


@pytest.mark.parametrize("line", QUICK, ids=" ".join)
def test_a_line_is_valid_or_has_messages(line: list[str]) -> None:
    """Bugs: a traceback from Hydra, OmegaConf or a constructor; a message without the key; a value without end."""
    started = time.perf_counter()
    assert not refused_in_the_dark(line)
    assert time.perf_counter() - started < _SECONDS


@pytest.mark.slow
def test_more_lines() -> None:
    """Bugs: those of the quick test, in rarer combinations."""
    failed = [line for line in MORE if refused_in_the_dark(line)]
    assert not failed, failed[:10]
