import pytest

from stabletrain.config.search_space import parse_space
from stabletrain.errors import UserError

BAD = {
    "lr=log(0,1)": "bounds above 0, got 0.0; the logarithm of 0",
    "lr=log(-1,1)": "bounds above 0",
    "n=log_int(0,8)": "bounds above 0",
    "lr=log(1e-1,1e-4)": "in the wrong order",
    "lr=linear(2,2)": "the bounds are equal",
    "lr=log(1e-4)": "needs two numbers, got '1e-4'",
    "lr=log(1e-4,1e-3,1e-2)": "needs two numbers",
    "lr=log(a,b)": "needs two numbers",
    "lr=linear(0,inf)": "finite bounds",
    "lr=linear(nan,1)": "finite bounds",
    "n=int(1.5,3)": "whole numbers, got 1.5",
    "lr=lgo(1,2)": "there is no lgo(); did you mean 'log'?",
    "lr=0.1": "at least two values, got '0.1'",
    "lr=": "expected KEY=log(LOW,HIGH)",
    "=log(1,2)": "expected KEY=log(LOW,HIGH)",
    "lr": "expected KEY=log(LOW,HIGH)",
    "clip=a,,b": "at least two values",
    "clip=a,b,a": "given twice",
}


@pytest.mark.parametrize("word", BAD)
def test_a_mistake_is_one_message(word: str) -> None:
    """Bug: a mistake in the space is a traceback of Optuna's, or is found after the first trial."""
    with pytest.raises(UserError) as found:
        parse_space([word])
    assert str(found.value).startswith(f"sweep: --over {word}: ")
    assert BAD[word] in str(found.value)
    assert "\n" not in str(found.value)


def test_no_dimension_and_one_twice() -> None:
    """Bug: a sweep over nothing, or over the last of two spaces."""
    for words, expected in (([], "--over is needed"), (["a=1,2", "+a=log(1,2)"], "a is given twice")):
        with pytest.raises(UserError, match=expected):
            parse_space(words)


def test_values_are_those_that_were_typed() -> None:
    """Bugs: a comma within a list ends a choice; a number loses digits on its way into an override; a whole number
    becomes 8.0, which the config refuses."""
    lists, quoted, whole, rate = parse_space(
        ["optimizer.betas=[0.9,0.95],[0.9,0.99]", "a='x,y',z", "n=log_int(8,512)", "lr=uniform(0,0.3)"]
    )
    assert lists.corners == ("[0.9,0.95]", "[0.9,0.99]")
    assert quoted.corners == ("'x,y'", "z")
    assert whole.corners == ("8", "512")
    assert (whole.is_log, whole.is_whole) == (True, True)
    assert float(rate.text(0.1 + 0.2)) == 0.1 + 0.2
    assert (rate.kind, rate.is_log) == ("linear", False)
    assert str(rate) == "lr=linear(0.0,0.3)"
