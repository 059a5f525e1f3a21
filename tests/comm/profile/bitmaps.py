"""What ran in each nanosecond, counted one by one, and what a report must then say."""

from dataclasses import dataclass, field

from hypothesis import strategies as st

from counterflow.comm.profile.report import Phase
from counterflow.comm.profile.trace import Thread

BASE = 1_740_461_679_470_813_001  # ns; more digits than a float holds
LIMIT = 60
MAIN: Thread = (1, 10)
MOVES: Thread = (1, 11)

COMPUTE = "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT"
TRANSFER = "void deep_ep::internode::dispatch<false, 8>(int4*)"
WAIT = "void deep_ep::internode::notify_dispatch<false, 8>(int const*)"
COPY = "Memcpy DtoD (Device -> Device)"
UNKNOWN = "zorp"
PHASES: tuple[str, ...] = ("dispatch(F)", "combine(B)", "mlp(F)", "attn(B)")


@dataclass
class Bitmap:
    """What runs in each ns, of a phase or of all."""

    compute: set[int] = field(default_factory=set)
    transfer: set[int] = field(default_factory=set)
    wait: set[int] = field(default_factory=set)
    copy: set[int] = field(default_factory=set)

    @property
    def comm(self) -> set[int]:
        return self.transfer | self.wait

    def add(self, name: str, times: set[int]) -> None:
        computes = name in (COMPUTE, UNKNOWN)
        kind = self.compute if computes else {TRANSFER: self.transfer, WAIT: self.wait}.get(name)
        (self.copy if kind is None else kind).update(times)


# A start and a duration.
lengths = st.tuples(st.integers(0, LIMIT), st.integers(0, 20))


def check_phase(phase: Phase, own: Bitmap, others: dict[str, Bitmap], everything: Bitmap) -> None:
    assert phase.compute == len(own.compute)
    assert phase.comm == len(own.comm)
    assert phase.exposed == len(own.comm - everything.compute)
    assert phase.waiting == len(own.wait - own.transfer)
    hidden = {
        name: len(own.comm & other.compute)
        for name, other in others.items()
        if name != phase.name and own.comm & other.compute
    }
    assert phase.behind == hidden
