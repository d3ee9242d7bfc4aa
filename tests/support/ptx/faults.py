"""Plant faults into the PTX of attention's forward, each of which the interpreter has to notice."""

import re
from typing import NamedTuple

KERNEL = "attention_forward"
CALL = "causal"  # The call of calls.py that is interpreted with each fault.


class PlantedFault(NamedTuple):
    """An edit of the text, at the first place that the pattern matches or at all of them, and what has to be said of it."""

    pattern: str
    replacement: str
    everywhere: bool
    notice: str  # A part of the message.

    def plant(self, ptx: str) -> str:
        """Return the text with the fault if it is that of the kernel."""
        if f".entry {KERNEL}(" not in ptx:
            return ptx
        edited, count = re.subn(self.pattern, self.replacement, ptx, count=0 if self.everywhere else 1)
        assert count, f"{self.pattern} is not in the text"
        return edited


WRONG = "wrong by more than"  # What the oracle says.
NO_FENCES = PlantedFault(r"fence\.proxy\.async\S*;", "", True, "no fence between proxies")
COMMON = {
    "a store past the end": PlantedFault(r"(st\.global\.v4\.b32 \[ %rd\d+ \+) 0", r"\1 1048576", False, "out of bounds"),
    "a misaligned store": PlantedFault(r"(st\.global\.v4\.b32 \[ %rd\d+ \+) 0", r"\1 2", False, "misaligned"),
    "a wrong sum": PlantedFault(r"add(\.rn\.f32)", r"sub\1", True, WRONG),
}
FAULTS = {
    "sm_80": COMMON
    | {
        "no barriers": PlantedFault(r"bar\.sync\s+0;", "", True, "race"),
        "one barrier less": PlantedFault(r"bar\.sync\s+0;", "", False, "race"),
        "no wait for copies": PlantedFault(r"cp\.async\.wait_group\s+\d+;", "", False, WRONG),
        "a copy from a row on": PlantedFault(r"(cp\.async\.cg\S+ \[ %r\d+ \+ 0 \], \[ %rd\d+ \+) 0", r"\1 128", False, WRONG),
        "a fragment transposed": PlantedFault(r"(ldmatrix\.sync\.aligned\.m8n8\.x4)\.shared", r"\1.trans.shared", False, WRONG),
    },
    "sm_90": COMMON
    | {
        "no barriers": PlantedFault(r"bar\.sync\s+0;", "", True, "there is no mbarrier"),
        "no wait for a copy": PlantedFault(r"mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;", "", False, "race"),
        "more bytes expected": PlantedFault(r"(expect_tx\S+ _, \[%r\d+\],) (\d+);", r"\1 1\2;", False, "deadlock"),
        "no wait for a product": PlantedFault(r"wgmma\.wait_group\.sync\.aligned \d;", "", False, WRONG),
        "no fences": NO_FENCES,
        "a copy to other rows": PlantedFault(r"(cp\.async\.bulk\.tensor\S+ \[%r\d+)\]", r"\1+128]", False, WRONG),
    },
    "sm_100": COMMON
    | {
        "no barriers": PlantedFault(r"bar\.sync\s+0;", "", True, "race"),
        "a barrier of one warp": PlantedFault(r"(bar\.sync\s+2,) 128;", r"\1 32;", True, "race"),
        "no waits for mbarriers": PlantedFault(r"mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;", "", True, "race"),
        "no waits for loads": PlantedFault(r"tcgen05\.wait::ld\.sync\.aligned;", "", True, "race"),
        "no wait for a store": PlantedFault(r"tcgen05\.wait::st\.sync\.aligned;", "", False, "race"),
        "no fences": NO_FENCES,
        "no commit": PlantedFault(r"@%p\d+ tcgen05\.commit[^;]*;", "", False, "deadlock"),
        "a product less": PlantedFault(r"@%p\d+ tcgen05\.mma[^;]*;", "", False, WRONG),
        "a product to other columns": PlantedFault(r"(tcgen05\.mma\S+ \[ %r\d+ \+) 0( \], %rd)", r"\1 64\2", False, WRONG),
        "a product of other columns": PlantedFault(
            r"(tcgen05\.mma\S+ \[ %r\d+ \+ 0 \], \[ %r\d+ \+) 8", r"\1 16", False, WRONG
        ),
        "too many registers": PlantedFault(r"(setmaxnreg\.inc\S*\s+)88;", r"\g<1>232;", True, "never enough registers"),
        "too few columns": PlantedFault(r"(tcgen05\.(de)?alloc\S* \S+,) 512", r"\1 256", True, "out of bounds"),
        "columns that are not freed": PlantedFault(r"@%p\d+ tcgen05\.dealloc[^;]*;", "", True, "has not freed"),
    },
}
