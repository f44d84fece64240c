"""What the GPU kernels compile to for every architecture, without a GPU: the bounds of docs/kernels.md."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs the triton package, which Linux has")

from kernels.tiles import read_table  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FAMILIES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_120")
BOUNDED = FAMILIES[1:]
SHARED = {"sm_86": 101_376, "sm_89": 101_376, "sm_120": 101_376, "sm_80": 166_912, "sm_87": 166_912, "sm_90": 232_448}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Compiled in a process of its own, as this one has the kernels loaded for the interpreter."""
    path = tmp_path_factory.mktemp("compiled") / "compiled.json"
    command = [sys.executable, "-m", "benchmarks.compiled", "--quick", "--json", str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert path.exists(), run.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(path.read_text())["records"]
    assert (run.returncode == 0) == all(record["holds"] for record in found), run.stdout[-2000:]
    return found


def of(records: list[dict[str, Any]], family: str, **values: Any) -> list[dict[str, Any]]:
    chosen = [r for r in records if r["family"] == family and all(r[k] == v for k, v in values.items())]
    assert chosen
    return chosen


def test_nothing_spills_and_shared_memory_is_what_the_cards_have(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert record["spilled"] == 0, record["case"]
        assert record["shared"] <= SHARED[record["architecture"]], record["case"]


@pytest.mark.parametrize("architecture", BOUNDED)
def test_a_weight_costs_few_instructions(records: list[dict[str, Any]], architecture: str) -> None:
    for block_m, limit in ((8, 2.5), (16, 3.0)):
        bounded = [r for r in of(records, "int4", architecture=architecture, block_m=block_m) if r["published"]]
        assert bounded
        for record in bounded:
            assert 1.5 < record["instructions_a_unit"] <= limit, record["case"]


@pytest.mark.parametrize("architecture", ("sm_86", "sm_89", "sm_90", "sm_120"))
def test_an_element_of_the_cache_costs_few_instructions(records: list[dict[str, Any]], architecture: str) -> None:
    for record in of(records, "decode attention", architecture=architecture):
        assert 2.5 < record["instructions_a_unit"] <= (6 if "int8" in record["case"] else 5), record["case"]


def test_levels_become_floats_without_a_conversion_instruction(records: list[dict[str, Any]]) -> None:
    for family in ("int4", "int8"):
        for record in of(records, family):
            counts = record["loop"]["counts"]
            assert not {"I2F", "I2FP", "I2HP"} & set(counts), record["case"]
            assert counts.get("HMMA", 0) + counts.get("HGMMA", 0) > 0, record["case"]


def test_weights_are_read_sixteen_bytes_at_a_time(records: list[dict[str, Any]]) -> None:
    for record in of(records, "int4") + of(records, "int8"):
        wide = sum(16 * count for name, count in record["loop"]["loads"].items() if name.endswith(" 16"))
        assert wide >= record["weight_bytes"] > record["narrow_bytes"], record["case"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_of_the_tile_tables_was_compiled(records: list[dict[str, Any]], family: str) -> None:
    compiled = {(r["block_m"], *r["tile"]) for r in records if r["architecture"] == family and r["tile"]}
    cards = read_table(family)
    assert cards
    for card in cards:
        for tile in card.entries.values():
            shape = (tile.block_n, min(tile.split_k, 2), tile.num_warps, tile.num_stages)
            assert (tile.block_m, *shape) in compiled
