"""Tile tables: the entry that was written, a rule for every other card and shape, and errors that name the field."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.gpu import tiles
from kernels.gpu.tiles import (
    TABLES,
    DeviceKey,
    Tile,
    block_m_for,
    default_tile,
    device_key,
    parse_table,
    pipeline_bytes,
    split_k_for,
)

RTX_3060 = DeviceKey((8, 6), 28, 101_376)
H200 = DeviceKey((9, 0), 132, 232_448)
ENTRY = {
    "block_m": 8, "n": 12288, "k": 4096, "group": 128, "bits": 4,
    "block_n": 64, "split_k": 3, "num_warps": 4, "num_stages": 5,
}  # fmt: skip


def card(*entries: dict[str, Any], multiprocessors: Any = 28, measured: Any = True) -> dict[str, Any]:
    return {"device": "a card", "multiprocessors": multiprocessors, "measured": measured, "entries": entries}


def write(path: Path, *cards: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"cards": cards}))
    return path


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where sm_86 has its table while a test runs."""
    monkeypatch.setattr(tiles, "TABLES", tmp_path)
    for cached in (tiles.read_table, tiles._tile_for):
        cached.cache_clear()
    yield tmp_path / "sm_86.json"
    for cached in (tiles.read_table, tiles._tile_for):
        cached.cache_clear()


def test_rows_take_the_smallest_block_that_holds_them() -> None:
    assert [block_m_for(rows) for rows in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 8192)] == [
        8, 8, 16, 16, 32, 32, 64, 64, 128, 128, 128
    ]  # fmt: skip


@pytest.mark.parametrize(("rows", "block_m"), [(129, 64), (192, 64), (193, 128), (293, 64), (330, 128), (1100, 128)])
def test_more_rows_than_a_block_take_the_one_that_pads_less(rows: int, block_m: int) -> None:
    assert block_m_for(rows) == block_m


def test_a_listed_shape_takes_its_entry_and_another_the_rule(table: Path) -> None:
    write(table, card(ENTRY))
    assert tiles.tile_for(5, 12288, 4096, 128, device=RTX_3060) == Tile(8, 64, 3, 4, 5)
    for other in ((9, 12288, 4096, 128), (5, 4096, 4096, 128), (5, 12288, 4096, 64)):
        expected = default_tile(block_m_for(other[0]), *other[1:4], 4, RTX_3060)
        assert tiles.tile_for(*other, device=RTX_3060) == expected
    assert tiles.tile_for(5, 12288, 4096, 128, bits=8, device=RTX_3060) == default_tile(
        8, 12288, 4096, 128, 8, RTX_3060
    )
    assert tiles.tile_for(5, 12288, 4096, 128, device=H200) == default_tile(8, 12288, 4096, 128, 4, H200)


def test_another_card_of_the_family_takes_the_nearest_tiles_with_splits_that_fill_it(table: Path) -> None:
    write(table, card(ENTRY), card(ENTRY | {"num_stages": 6, "split_k": 9}, multiprocessors=82))
    rtx_3080 = DeviceKey((8, 6), 68, 101_376)
    assert tiles.tile_for(5, 12288, 4096, 128, device=rtx_3080) == Tile(8, 64, 1, 4, 6)  # 192 tiles fill it twice
    assert tiles.tile_for(5, 12288, 4096, 128, device=RTX_3060) == Tile(8, 64, 3, 4, 5)


def test_a_tile_that_does_not_fit_the_cards_shared_memory_is_not_taken(table: Path) -> None:
    write(table, card(ENTRY | {"num_stages": 17}))
    assert tiles.tile_for(5, 12288, 4096, 128, device=RTX_3060) == default_tile(8, 12288, 4096, 128, 4, RTX_3060)


@pytest.mark.parametrize("multiprocessors", [1, 16, 28, 46, 82, 132, 170])
@pytest.mark.parametrize("shape", [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)], ids=str)
def test_no_program_of_a_split_comes_away_empty(shape: tuple[int, int], multiprocessors: int) -> None:
    chunks = shape[1] // 128
    split = split_k_for(*shape, 128, multiprocessors)
    share = -(-chunks // split)
    assert share * (split - 1) < chunks <= share * split


@pytest.mark.parametrize("device", [RTX_3060, H200, DeviceKey((7, 5), 40, 65_536), tiles.INTERPRETER], ids=str)
@pytest.mark.parametrize("block_m", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("shape", [(12288, 4096), (4096, 11008), (64, 128), (151936, 4096)], ids=str)
def test_the_rule_fills_the_card_and_fits_its_shared_memory(
    shape: tuple[int, int], block_m: int, device: DeviceKey
) -> None:
    tile = default_tile(block_m, *shape, 128, 4, device)
    assert pipeline_bytes(block_m, tile.block_n, tile.num_stages) <= device.shared_memory
    assert tile.split_k <= max(1, shape[1] // 128 // 4)
    if block_m <= 16 and shape[1] >= 4096:
        programs = -(-shape[0] // tile.block_n) * tile.split_k
        assert programs >= 2 * device.multiprocessors or tile.split_k == shape[1] // 128 // 4


def test_the_cpu_has_the_interpreters_key() -> None:
    assert device_key(torch.device("cpu")) is tiles.INTERPRETER


def test_every_table_that_ships_can_be_read_and_says_whether_it_was_measured() -> None:
    for path in TABLES.glob("*.json"):
        assert all(card.entries for card in parse_table(path))
        for content in json.loads(path.read_text())["cards"]:
            assert {"device", "multiprocessors", "measured", "versions", "commit", "date", "entries"} == set(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split_k": 0}, "entry 1: split_k is 0, expected a number of 1 or more"),
        ({"block_n": 96}, r"entry 1: block_n is 96, expected \(64, 128\)"),
        ({"num_warps": "4"}, "entry 1: num_warps is '4'"),
        ({"warps": 4}, r"entry 1: fields \['warps'\] are missing or unknown"),
        ({"block_m": 64}, "entry 1: split_k is 3, the prefill kernel takes 1"),
        ({}, "entry 1: .*'n': 12288.* is listed twice"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"sm_86.json, a card, {message}"):
        parse_table(write(tmp_path / "sm_86.json", card(ENTRY, ENTRY | change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"multiprocessors": 0}, "multiprocessors is 0, expected a number of 1 or more"),
        ({"measured": 1}, "measured is 1"),
    ],
)
def test_a_wrong_card_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"sm_86.json, a card: {message}"):
        parse_table(write(tmp_path / "sm_86.json", card(ENTRY, **change)))


@pytest.mark.parametrize("text", ['{"cards": ', "[]", '{"cards": [1]}', '{"cards": [{"device": "a card"}]}'])
def test_a_file_that_is_no_table_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "sm_86.json").write_text(text)
    with pytest.raises(ValueError, match="sm_86.json is not a tile table .*benchmarks.tune"):
        parse_table(tmp_path / "sm_86.json")
