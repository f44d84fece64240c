"""Tile tables: the entry that was written, a rule for every other card and shape, and errors that name the field."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import tiles
from kernels.tiles import TABLES, DeviceKey, Tile, block_m_for, default_tile, device_key, parse_table, pipeline_bytes

RTX_3060 = DeviceKey((8, 6), 28, 101_376)
H200 = DeviceKey((9, 0), 132, 232_448)
ENTRY = {
    "block_m": 8, "n": 12288, "k": 4096, "group": 128, "bits": 4,
    "block_n": 64, "split_k": 3, "num_warps": 4, "num_stages": 5,
}  # fmt: skip


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"entries": entries}))
    return path


def test_rows_take_the_smallest_block_that_holds_them() -> None:
    assert [block_m_for(rows) for rows in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 8192)] == [
        8, 8, 16, 16, 32, 32, 64, 64, 128, 128, 128, 128
    ]  # fmt: skip


def test_a_listed_shape_takes_its_entry_and_another_the_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiles, "TABLES", tmp_path)
    tiles.read_table.cache_clear()
    write(tmp_path / "sm_86.json", ENTRY)
    try:
        assert tiles.tile_for(5, 12288, 4096, 128, device=RTX_3060) == Tile(8, 64, 3, 4, 5)
        for other in ((9, 12288, 4096, 128), (5, 4096, 4096, 128), (5, 12288, 4096, 64)):
            assert tiles.tile_for(*other, device=RTX_3060) == default_tile(
                block_m_for(other[0]), *other[1:3], 4, RTX_3060
            )
        assert tiles.tile_for(5, 12288, 4096, 128, device=H200) == default_tile(8, 12288, 4096, 4, H200)
    finally:
        tiles.read_table.cache_clear()


@pytest.mark.parametrize("device", [RTX_3060, H200, DeviceKey((7, 5), 40, 65_536), tiles.INTERPRETER], ids=str)
@pytest.mark.parametrize("block_m", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("shape", [(12288, 4096), (4096, 11008), (64, 128), (151936, 4096)], ids=str)
def test_the_rule_fills_the_card_and_fits_its_shared_memory(
    shape: tuple[int, int], block_m: int, device: DeviceKey
) -> None:
    tile = default_tile(block_m, *shape, 4, device)
    assert pipeline_bytes(block_m, tile.block_n, tile.num_stages) <= device.shared_memory
    assert tile.split_k <= max(1, shape[1] // 128 // 4)
    if block_m <= 16 and shape[1] >= 4096:
        programs = -(-shape[0] // tile.block_n) * tile.split_k
        assert programs >= 2 * device.multiprocessors or tile.split_k == shape[1] // 128 // 4


def test_the_cpu_has_the_interpreters_key() -> None:
    assert device_key(torch.device("cpu")) is tiles.INTERPRETER


def test_every_table_that_ships_can_be_read_and_says_whether_it_was_measured() -> None:
    for path in TABLES.glob("*.json"):
        assert parse_table(path)
        content = json.loads(path.read_text())
        assert content["measured"] in (True, False) and {"device", "versions", "commit", "date"} <= set(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split_k": 0}, "entry 1: split_k is 0, expected a number from 1 on"),
        ({"block_n": 96}, r"entry 1: block_n is 96, expected \(64, 128\)"),
        ({"num_warps": "4"}, "entry 1: num_warps is '4'"),
        ({"warps": 4}, r"entry 1: fields \['warps'\] are missing or unknown"),
        ({"block_m": 64}, "entry 1: split_k is 3, the prefill kernel takes 1"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_table(write(tmp_path / "sm_86.json", ENTRY, ENTRY | change))


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "sm_86.json").write_text('{"entries": ')
    with pytest.raises(ValueError, match="sm_86.json is no tile table .*benchmarks.tune"):
        parse_table(tmp_path / "sm_86.json")
