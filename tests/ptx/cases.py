"""Every kernel's compiled code against float64, and with a barrier or a wait taken out: one JSON line each.

Run by test_ptx.py in a process of its own, as the tests' own has the kernels loaded for Triton's interpreter.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from emulate import Edit, emulated
from memory import Fault

from benchmarks.kernels.problem import Gemm, Problem, attention_error, random_attention
from kernels.gpu.attention import attention_triton
from kernels.gpu.gemm import rows_triton
from kernels.gpu.tiles import Tile
from kernels.gpu.turing import dequantize

SWIGLU = Gemm("SwiGLU", 256, 128, epilogue="swiglu", norm=True)
RESIDUAL = Gemm("residual", 384, 96, epilogue="residual", bias=True)
ZEROS = Gemm("zeros in groups of 32", 256, 72, zeros=True, group=32)
ONE_GROUP = Gemm("one group", 256, 72, group=256)
HEAD = Gemm("int8 head", 256, 200, bits=8, group=256)
# capability, projection, rows, tile
PRODUCTS = [
    (86, SWIGLU, 1, Tile(8, 64, 1, 1, 3)),
    (86, RESIDUAL, 3, Tile(8, 128, 3, 2, 4)),
    (86, ZEROS, 12, Tile(16, 64, 2, 4, 3)),
    (86, HEAD, 5, Tile(8, 128, 1, 2, 3)),
    (86, SWIGLU, 20, Tile(32, 64, 1, 4, 3)),
    (75, SWIGLU, 1, Tile(1, 128, 1, 4, 1)),
    (75, RESIDUAL, 2, Tile(2, 64, 3, 2, 1)),
    (75, ZEROS, 3, Tile(4, 64, 2, 4, 1)),
    (75, ONE_GROUP, 6, Tile(4, 128, 1, 4, 1)),
    (75, HEAD, 1, Tile(1, 128, 1, 4, 1)),
]
ATTENTION = [(86, 1, False), (86, 1, True), (86, 5, True), (75, 1, False), (75, 1, True)]


def product(capability: int, gemm: Gemm, rows: int, tile: Tile, edit: Edit = lambda ptx: ptx) -> tuple[float, float]:
    """Relative error against float64, and what is allowed."""
    problem = Problem.random(gemm, rows, device="cpu")
    problem = replace(problem, rows=replace(problem.rows, x=problem.rows.x.clone()))
    with emulated(capability, edit):
        error = problem.error(tile)
    assert not problem.weight.locks.any()
    # sums in float16 on Turing: see tests/test_turing.py
    return error, problem.tolerance if capability != 75 else 1.3e-3


def attention(capability: int, length: int, int8: bool, edit: Edit = lambda ptx: ptx) -> tuple[float, float]:
    args = random_attention(2, 32, 48, (0, 41), length, device="cpu", int8=int8)
    with emulated(capability, edit):
        out = attention_triton(args, splits=2)
    return max(attention_error(out, args, sequence) for sequence in (0, 1)), 2e-3


def others() -> Iterator[tuple[str, float, float]]:
    """The kernels that prepare for the others."""
    problem = Problem.random(ZEROS, 1, device="cpu")
    with emulated(75):
        found = dequantize(problem.weight)
    expected = problem.weight.dequantize()
    yield "sm_75 dequantize", float((found[:, :256] - expected).norm() / expected.norm()), 3e-4
    x = torch.randn(3, 96).half()
    with emulated(86):
        sums = rows_triton(x).sums
    assert sums is not None
    yield "sm_86 sums of rows", float((sums[:, :3].T - x.float().unflatten(1, (3, 32)).sum(2)).abs().max()), 1e-4


def without(kind: str, number: int) -> Edit:
    """PTX without its `number`-th instruction of a kind."""

    def edit(ptx: str) -> str:
        places = [match.span() for match in re.finditer(rf"{kind}[^;]*;", ptx)]
        start, end = places[number]
        return ptx[:start] + ptx[end:]

    return edit


def damaged() -> Iterator[dict]:
    """What is found when a barrier, or the wait for a copy, is taken out of a kernel."""
    runs = {
        "sm_86 decode": lambda edit: product(*PRODUCTS[1], edit),
        "sm_75 few rows": lambda edit: product(*PRODUCTS[6], edit),
        "sm_86 attention": lambda edit: attention(86, 1, True, edit),
    }
    for name, run in runs.items():
        counts: dict[str, int] = {}

        def count(ptx: str, counts: dict[str, int] = counts) -> str:
            counts.update({kind: len(re.findall(rf"{kind}[^;]*;", ptx)) for kind in (r"bar\.sync", r"cp\.async\.wait")})
            return ptx

        run(count)
        for kind, found in counts.items():
            caught = []
            for number in range(found):
                try:
                    error, allowed = run(without(kind, number))
                except Fault as fault:
                    caught.append(str(fault))
                else:
                    caught.append("" if error < allowed else f"error {error}")
            if found:
                yield {"damaged": name, "kind": kind, "caught": caught}


def main() -> None:
    torch.manual_seed(0)
    for case in PRODUCTS:
        error, allowed = product(*case)
        name = f"sm_{case[0]} {case[1].name}, {case[2]} rows"
        print(json.dumps({"case": name, "error": error, "allowed": allowed}), flush=True)
    for case in ATTENTION:
        error, allowed = attention(*case)
        name = f"sm_{case[0]} attention, {case[1]} tokens, {'int8' if case[2] else 'float16'} cache"
        print(json.dumps({"case": name, "error": error, "allowed": allowed}), flush=True)
    for name, error, allowed in others():
        print(json.dumps({"case": name, "error": error, "allowed": allowed}), flush=True)
    for line in damaged():
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
