"""The tuner: what it tries, how it searches, and that a table is written whole or not at all."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package, which Linux has")

from benchmarks.kernels.offline import GPUS  # noqa: E402
from benchmarks.kernels.problem import GEMMS, HEAD, MLP_C_PROJ, Gemm, Problem  # noqa: E402
from benchmarks.tune import candidates, entry_of, search, shared_bytes, write_card  # noqa: E402
from kernels.gpu.tiles import Tile, parse_table  # noqa: E402

RTX_3060 = next(gpu.key for gpu in GPUS if gpu.name.endswith("3060"))


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_candidates_fit_the_gpu_and_leave_no_program_empty(gpu: Any) -> None:
    for gemm in GEMMS:
        for block_m in [m for m in gpu.key.rows if gemm is not HEAD or m <= 16]:
            found = candidates(gemm, block_m, gpu.key)
            assert len(set(found)) == len(found) > 3
            for tile in found:
                chunks = gemm.k // 128
                share = -(-chunks // tile.split_k)
                assert share * (tile.split_k - 1) < chunks
                assert shared_bytes(tile, gemm.bits) <= gpu.key.shared_memory


def test_the_search_finds_the_cheapest_tile_without_trying_all() -> None:
    tiles = candidates(MLP_C_PROJ, 8, RTX_3060)
    wanted, tried = tiles[-1], []

    def cost(tile: Tile) -> float:
        tried.append(tile)
        same = sum(
            getattr(tile, name) == getattr(wanted, name) for name in ("block_n", "split_k", "num_warps", "num_stages")
        )
        return 10.0 - same

    assert search(tiles, cost) == (wanted, 6.0)
    assert len(tried) == len(set(tried)) < len(tiles)


def test_a_device_on_which_nothing_runs_is_an_error() -> None:
    tiles = candidates(MLP_C_PROJ, 8, RTX_3060)
    with pytest.raises(ValueError, match="none of .* tiles runs on this device"):
        search(tiles, lambda tile: math.inf)


def test_a_card_is_written_beside_the_others_and_its_shapes_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "tiles" / "sm_86.json"
    made = {"versions": {}, "commit": "", "date": ""}

    def card(name: str, count: int, measured: bool, *tiles: Tile) -> dict[str, Any]:
        entries = [entry_of(MLP_C_PROJ, tile) for tile in tiles]
        return {"device": name, "multiprocessors": count, "measured": measured, **made, "entries": entries}

    small, large = Tile(8, 64, 3, 1, 4), Tile(16, 128, 5, 2, 3)
    write_card(path, card("big", 82, False, small, large))
    write_card(path, card("little", 28, True, small))
    write_card(path, card("little", 28, True, large))
    write_card(path, card("little", 28, True, Tile(8, 128, 1, 4, 2)))
    little, big = parse_table(path)
    assert (little.multiprocessors, little.measured, big.multiprocessors, big.measured) == (28, True, 82, False)
    assert set(little.entries.values()) == {Tile(8, 128, 1, 4, 2), large}
    # what was estimated goes when something is measured: a table does not mix the two for one card
    write_card(path, card("big", 82, True, small))
    assert list(parse_table(path)[1].entries.values()) == [small]
    before = path.read_text()
    with pytest.raises(ValueError, match="split_k is 2, the prefill kernel takes 1"):
        write_card(path, card("big", 82, True, Tile(64, 128, 2, 4, 3)))
    assert path.read_text() == before
    assert len(json.loads(before)["cards"]) == 2


def test_a_problem_notices_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.random(
        Gemm("small", 256, 64, norm=True, bias=True), 3, device="cuda" if torch.cuda.is_available() else "cpu"
    )
    assert problem.error() < problem.tolerance
    problem.weight.scales[0, 5] *= 1.5
    wrong = problem.run()
    problem.weight.scales[0, 5] /= 1.5
    monkeypatch.setattr(Problem, "run", lambda self, tile=None: wrong)
    assert problem.error() > 4 * problem.tolerance
