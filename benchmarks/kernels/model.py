"""Microseconds of one launch by a model: programs in order onto multiprocessors, which share the memory's bandwidth.

A program's turns take what its control bits say of a warp alone, or longer where its multiprocessor has to issue more,
or its tensor cores to multiply more, for all that are resident; together they read no faster than EFFICIENCY of the
published bandwidth. Nothing here was measured on a GPU.
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.kernels.control_bits import HALF_CYCLES, HMMA_CYCLES, cycles_a_turn
from benchmarks.kernels.offline import Compiled, Gpu
from benchmarks.kernels.problem import Gemm
from kernels.gpu.tiles import CHUNK, Tile

MEMORY_NS, L2_NS = 600, 200  # latencies of a load under load (published microbenchmarks give 400 to 700 and 150 to 250)
EFFICIENCY = 0.92  # of the published bandwidth, as a copy reaches it
ISSUE = 0.8  # of a scheduler's cycles in which it finds a warp that can go on
START_US, END_US, MERGE_US = 0.9, 0.7, 2.2  # of a program: its pipeline fills, its results are stored, its parts added
STEPS = 250  # of the simulation, of what the launch would take at the published bandwidth


@dataclass(frozen=True)
class Work:
    """Programs of a launch, the turns of each, and the bytes that a turn reads from memory."""

    programs: int
    turns: int
    turn_bytes: float
    end_us: float = END_US

    @classmethod
    def of_gemm(cls, gemm: Gemm, tile: Tile) -> "Work":
        """A launch of the decode kernel."""
        chunks = -(-gemm.k // CHUNK)
        return cls(
            -(-gemm.n // tile.block_n) * tile.split_k,
            -(-chunks // tile.split_k),
            tile.block_n * (CHUNK * gemm.bits / 8 + (2 if gemm.bits == 4 else 0)),
            END_US + (MERGE_US if tile.split_k > 1 else 0),
        )


def roofline_us(gpu: Gpu, nbytes: float) -> float:
    """Microseconds at the published bandwidth."""
    return nbytes / gpu.gb_per_s / 1e3


def launch_us(gpu: Gpu, work: Work, compiled: Compiled, *, num_warps: int, stages: int) -> float:
    """Microseconds of one launch, infinite for a kernel that spills or does not fit. stages: tiles in flight or use."""
    resident = gpu.resident(compiled.registers, compiled.shared, num_warps)
    if compiled.spilled or not compiled.schedule or not resident:
        return float("inf")
    steps, capability = compiled.schedule, gpu.capability
    alone = cycles_a_turn(steps, capability, memory=MEMORY_NS * gpu.ghz, l2=L2_NS * gpu.ghz)
    alone = max(
        alone, MEMORY_NS * gpu.ghz / max(1, stages - 1)
    )  # words arrive that many turns after they are asked for
    issued = len(steps) * num_warps / 4 / ISSUE
    half = sum(step.name.startswith(("HFMA2", "HADD2", "HMUL2")) for step in steps) * num_warps / 4
    products = sum(step.name.startswith("HMMA") for step in steps) * num_warps / 4
    # of one resident program; n of them take n times as long once that is more than a warp's own time
    busy = max(issued, half * HALF_CYCLES.get(capability, 0), products * HMMA_CYCLES[capability] * 1.05)
    return _simulate(gpu, work, resident, alone, busy)


def _simulate(gpu: Gpu, work: Work, resident: int, alone: float, busy: float) -> float:
    """The fluid model: states of all places for programs, advanced in equal steps."""
    step_us = max(0.02, roofline_us(gpu, work.programs * work.turns * work.turn_bytes) / STEPS)
    shape = (gpu.multiprocessors, resident)
    fed, starting, running, ending = 0, 1, 2, 3
    state, left, timer = np.zeros(shape, int), np.zeros(shape), np.zeros(shape)
    # breadth first: the first wave is spread over the multiprocessors
    order = np.arange(shape[0] * shape[1]).reshape(shape[1], shape[0]).T
    first = order < work.programs
    state[first], timer[first], left[first] = starting, START_US, work.turns
    fed = int(first.sum())
    now = 0.0
    while state.any():
        at_work = state == running
        count = at_work.sum(1)
        turn_cycles = np.maximum(alone, count * busy)
        rate = np.where(count > 0, gpu.ghz * 1e3 / turn_cycles, 0.0)  # turns a microsecond of each program
        asked = float((rate * count).sum()) * work.turn_bytes / 1e3  # GB/s
        share = min(1.0, gpu.gb_per_s * EFFICIENCY / asked) if asked else 1.0
        left -= np.where(at_work, rate[:, None] * share * step_us, 0.0)
        timer -= step_us
        done = at_work & (left <= 0)
        started, ended = (state == starting) & (timer <= 0), (state == ending) & (timer <= 0)
        state[started] = running
        state[done], timer[done] = ending, work.end_us
        state[ended] = 0
        for place in np.argwhere(ended)[: work.programs - fed]:
            state[tuple(place)], timer[tuple(place)], left[tuple(place)] = starting, START_US, work.turns
            fed += 1
        now += step_us
    return now
