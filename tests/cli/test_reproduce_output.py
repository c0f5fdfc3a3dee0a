"""What `stabletrain reproduce --check` prints of a comparison, and its exit codes."""

from types import SimpleNamespace
from typing import Any

import pytest

from stabletrain.cli import reproduce as command
from stabletrain.launch.reproduce import Checked
from stabletrain.launch.result import Result
from stabletrain.tracking.same_run import SameSteps, Step
from stabletrain.tracking.what_differs import Difference, Differences

SAME = SameSteps(compared=60)
OTHER = SameSteps(
    compared=60, first=4, parts=("loss",), then=Step(2.0, 1.0, 1), now=Step(3.0, 1.0, 1), beyond=4, largest=0.5
)
NONE = Differences([], [], [])
FOUND = Differences([Difference("code", "mine/net.py changed"), Difference("threads", "1 -> 2")], [], ["data"])


def printed(same: SameSteps, differences: Differences, **more: Any) -> str:
    return "\n".join(command._lines(Checked(same=same, differences=differences, **more), ""))


def test_the_verdict_comes_first_then_the_likely_cause() -> None:
    """Bugs: without a recorded difference nothing is said of what is never recorded; the operators that torch has named
    are lost; what is unknown is not said; a difference without effect looks like a cause."""
    assert printed(SAME, NONE) == "bit-identical over 60 steps"
    assert "differs, without effect on these steps:\n  code: mine/net.py changed" in printed(SAME, FOUND)
    text = printed(OTHER, FOUND)
    assert text.startswith("differs from step 4 on\n")
    assert "what differs, the most likely cause first:\n  code: mine/net.py changed\n  threads: 1 -> 2\n" in text
    assert text.endswith("unknown, since one of the two has not recorded it:\n  data")
    nothing = printed(OTHER, NONE, undetermined=("scatter_add_cuda", "cumsum"))
    assert "nothing that was recorded differs; never recorded are: the kernels that autotuning has chosen" in nothing
    assert "torch names as non-deterministic: scatter_add_cuda, cumsum" in nothing
    ended = printed(SameSteps(compared=20, missing=40), NONE, end="failed: out of memory")
    assert "40 steps of the original that the repeat has not made" in ended
    assert "the repeat has ended: failed: out of memory" in ended
    many = Differences([Difference("code", f"{i}") for i in range(30)], [], [])
    assert "  and 20 more" in printed(OTHER, many)


@pytest.mark.parametrize(
    ("ends", "verdicts", "has_next", "code"),
    [
        (["finished"], [SAME], False, 0),
        (["failed"], [SAME], False, 0),  # as the original
        (["finished"], [OTHER], False, 1),
        (["finished", "finished"], [SAME, SAME], False, 0),
        (["finished"], [SAME], True, 1),  # the next part was not run
        (["failed"], [SameSteps(compared=0)], False, 1),
        (["interrupted"], [SameSteps(compared=9, missing=9)], False, 130),
        (["terminated"], [SameSteps(compared=9, missing=9)], False, 143),
    ],
)
def test_exit_codes_of_a_check(
    ends: list[Any], verdicts: list[SameSteps], has_next: bool, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bugs: a check that could not be made exits with 0; Ctrl-C looks like a difference."""
    done = [
        SimpleNamespace(
            part=SimpleNamespace(has_next=has_next and i == len(ends) - 1),
            job=SimpleNamespace(result=Result(end=end)),
            checked=Checked(same=same, differences=NONE),
        )
        for i, (end, same) in enumerate(zip(ends, verdicts, strict=True))
    ]
    monkeypatch.setattr(command, "reproduce", lambda *_, **__: done)
    assert command.run("it", check=True, steps=None, changes=[], trust=[]) == code
