"""What the assembler wrote into each instruction of a kernel for the warp scheduler, and how long a warp takes by it.

Since Volta every instruction of 128 bits carries, from bit 105 on: the cycles until the next one may issue (4 bits), a
yield flag, the barriers that it sets when its result is there and when its operands were read (3 bits each, 7 for
none), and a mask of the barriers that it waits for (6 bits). Only instructions of unknown latency use barriers.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

BARRIERS = 6
TURNS = 6  # that are simulated: the first fills what later ones wait for
# cycles from issue to result of what the barriers guard, other than loads from global memory; the rest take 20
LATENCY = {
    "LDS": 28, "LDSM": 33, "SHFL": 24, "S2R": 25, "MUFU": 22, "LDGSTS": 30, "F2FP": 6, "BAR": 30, "DEPBAR": 1,
    "LDGDEPBAR": 2, "POPC": 15, "R2UR": 12, "ATOMG": 600, "LDC": 40, "ULDC": 1, "WARPSYNC": 1, "HGMMA": 128,
    "MOVM": 10, "STL": 20, "LDL": 30,
}  # fmt: skip
HMMA_LATENCY = 34
HMMA_CYCLES = {75: 32, 80: 8, 86: 32, 87: 8, 89: 32, 90: 8, 120: 32}  # that one warp's m16n8k16 keeps its tensor core
HALF_CYCLES = {75: 2}  # that a warp's float16 pair operation keeps its pipe, where that is more than one


class Step(NamedTuple):
    """One instruction as the scheduler sees it."""

    name: str  # with its modifiers
    stall: int  # cycles until the next may issue
    sets: int  # barrier that is freed when its result is there; 7: none
    frees: int  # barrier that is freed when its operands were read; 7: none
    waits: int  # mask of barriers


def read_steps(listing: str) -> list[Step]:
    """The longest loop of an `nvdisasm -c -hex` listing, found by its backward branch; empty if there is none."""
    steps: list[Step] = []
    labels: dict[str, int] = {}
    longest: list[Step] = []
    name = target = None
    for line in listing.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(steps)
        elif found := re.search(
            r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?)/\* 0x[0-9a-f]{16} \*/", line
        ):
            name, target = found[1], re.search(r"`\(\.(L_x_\d+)\)", found[2])
        elif name and (found := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line)):
            bits = int(found[1], 16) >> 41
            steps.append(Step(name, max(1, bits & 15), bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63))
            if name.startswith("BRA") and target and target[1] in labels:
                longest = max(longest, steps[labels[target[1]] :], key=len)
            name = None
    return longest


def cycles_a_turn(steps: Sequence[Step], capability: int, *, memory: float, l2: float) -> float:
    """Cycles that a warp alone takes for one turn of a loop. memory, l2: cycles of a load that misses or hits the L2.

    Loads of 8 or 16 bytes into registers are of x and its sums, which every program reads; narrow ones are of scales.
    """
    now, tensor_free, starts = 0.0, 0.0, list[float]()
    ready = [0.0] * BARRIERS
    for _ in range(TURNS):
        starts.append(now)
        for name, stall, sets, frees, waits in steps:
            for barrier in range(BARRIERS):
                if waits >> barrier & 1:
                    now = max(now, ready[barrier])
            kind = name.split(".")[0]
            latency: float = LATENCY.get(kind, 20)
            if kind == "LDG":
                latency = l2 if ".64" in name or ".128" in name else memory
            elif kind == "HMMA":
                now = max(now, tensor_free)
                tensor_free, latency = now + HMMA_CYCLES[capability], HMMA_LATENCY
            if sets != 7:
                ready[sets] = max(ready[sets], now + latency)
            if frees != 7:
                ready[frees] = max(ready[frees], now + min(latency, 20))
            now += stall
    return (now - starts[1]) / (TURNS - 1)
