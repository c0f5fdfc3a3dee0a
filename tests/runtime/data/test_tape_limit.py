"""What the limit of the tapes itself keeps."""

from stabletrain.runtime.data.tape import EpochEnded, Tape
from stabletrain.runtime.data.tape_limit import TapeLimit


def test_a_run_that_reloads_its_loader_for_ever_keeps_one_size():
    """Bug: the sizes of all tapes that there ever were are kept, and added up at each batch."""
    present: list[Tape] = []
    limit = TapeLimit(lambda: present)
    limit.set(10, 1000)
    kept = []
    for _ in range(50):
        kept.append(Tape(enabled=True))  # a mark may hold it
        present[:] = kept[-1:]
        for _ in range(3):
            kept[-1].record(EpochEnded(0, None))
            limit.enforce(kept[-1])
    assert len(limit._sizes) == 1
