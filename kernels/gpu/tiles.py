"""Which tile a GPU kernel of the int4 family uses: from a table per GPU family, or by rule where none lists it.

tiles/sm_XX.json holds {"cards": [{"device", "multiprocessors", "measured", "versions", "commit", "date", "entries":
[{"block_m", "n", "k", "group", "bits", "block_n", "split_k", "num_warps", "num_stages"}, …]}, …]}; `measured` is false
where nobody has run the tuner (python -m benchmarks.tune) on such a card. Nothing is ever tuned while a model runs.
"""

import json
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch

TABLES = Path(__file__).with_name("tiles")
DECODE_ROWS = (8, 16)  # block_m of the decode kernel
TURING_ROWS = (1, 2, 4)  # block_m of the one on Turing; more rows than 4 are several launches
PREFILL_ROWS = (32, 64, 128)  # block_m of the prefill kernel
CHUNK = 128  # input channels of one step of a kernel
SHARED = 101_376  # bytes a program may use on consumer cards (sm_86, sm_89, sm_120)
HALF_BLOCK = 1.1  # cost of a row in a block of 64 against one of 128: each weight is unpacked for half as many rows
START_COST = 2  # of a program, in steps: its pipeline fills, and its part of a split sum is stored


@dataclass(frozen=True)
class Tile:
    """One program's outputs (block_n) and rows (block_m), programs that share an output tile, and launch options."""

    block_m: int
    block_n: int
    split_k: int
    num_warps: int
    num_stages: int


Key: TypeAlias = tuple[int, int, int, int, int]  # block_m, n, k, group, bits


@dataclass(frozen=True)
class CardTiles:
    """The entries of one GPU of a family."""

    multiprocessors: int
    measured: bool
    entries: dict[Key, Tile]


@dataclass(frozen=True)
class DeviceKey:
    """What the choice of a tile depends on."""

    capability: tuple[int, int]  # compute capability, (8, 6) for an RTX 3060
    multiprocessors: int
    shared_memory: int  # bytes that one program may use

    @property
    def family(self) -> str:
        """The name of its table, e.g. "sm_86"."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def turing(self) -> bool:
        """Whether its tensor cores are out of Triton's reach: it has kernels of its own (turing.py)."""
        return self.capability[0] == 7

    @property
    def rows(self) -> tuple[int, ...]:
        """block_m of the kernels that it runs."""
        return TURING_ROWS if self.turing else (*DECODE_ROWS, *PREFILL_ROWS)


INTERPRETER = DeviceKey((0, 0), 1, SHARED)


@cache
def device_key(device: torch.device) -> DeviceKey:
    """The key of a CUDA device, asked for once; of the interpreter for the CPU."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", SHARED)
    return DeviceKey((properties.major, properties.minor), properties.multi_processor_count, shared)


def block_m_for(rows: int, device: DeviceKey = INTERPRETER) -> int:
    """Rows of one program: the smallest block that holds `rows`, or the largest.

    Of more rows than that, the half of it where it pads much less: 293 rows are 320 in blocks of 64 and 384 in blocks
    of 128.
    """
    most = PREFILL_ROWS[-1]
    if (
        rows > most
        and not device.turing
        and -(-rows // (most // 2)) * (most // 2) * HALF_BLOCK < -(-rows // most) * most
    ):
        return most // 2
    return next((block for block in device.rows if rows <= block), device.rows[-1])


def tile_for(rows: int, n: int, k: int, group: int, *, bits: int = 4, device: DeviceKey) -> Tile:
    """The tile for x (rows, k) and a weight (n, k): the family's table, or the rule for what it does not list.

    A card that is not in its family's table takes the tiles of the one with the nearest number of multiprocessors, but
    not its split_k: that is what fills a card.
    """
    return _tile_for(block_m_for(rows, device), n, k, group, bits, device)


@cache
def _tile_for(block_m: int, n: int, k: int, group: int, bits: int, device: DeviceKey) -> Tile:
    cards = read_table(device.family)
    if cards:
        card = min(cards, key=lambda card: abs(card.multiprocessors - device.multiprocessors))
        tile = card.entries.get((block_m, n, k, group, bits))
        if tile and pipeline_bytes(block_m, tile.block_n, tile.num_stages, bits) <= device.shared_memory:
            if card.multiprocessors == device.multiprocessors or block_m in PREFILL_ROWS:
                return tile
            return replace(tile, split_k=split_k_for(n, k, tile.block_n, device.multiprocessors))
    return default_tile(block_m, n, k, group, bits, device)


def default_tile(block_m: int, n: int, k: int, group: int, bits: int, device: DeviceKey) -> Tile:
    """A safe tile for any card: enough programs to fill it about twice, pipelines that fit its shared memory.

    Two warps of a 128-output tile share each fragment of x among 64 rows of the weight: 1.9 instructions per weight for
    8 rows where four warps take 2.4 (sm_86, triton 3.7.1). Scales of small groups need registers of their own: with the
    tiles for groups of 128 a prefill spilled 16 bytes with groups of 64 (sm_87), decode 24 with groups of 32 and zeros
    (sm_89).
    """
    if block_m in PREFILL_ROWS:
        block_n = 128 if group >= CHUNK else 64
        stages = next((s for s in (3, 2) if pipeline_bytes(block_m, block_n, s, bits) <= device.shared_memory), 1)
        return Tile(block_m, block_n, 1, 8 if block_m == 128 else 4, stages)
    if block_m in TURING_ROWS:
        # two warps of 64 outputs: 2.5, 3.5 and 3.9 instructions a weight for 1, 2 and 4 rows; of four warps of 128, 4
        # rows spill 20 bytes
        return Tile(block_m, 64, split_k_for(n, k, 64, device.multiprocessors), 2, 1)
    stages = next((s for s in (4, 3, 2) if 2 * pipeline_bytes(block_m, 128, s, bits) <= device.shared_memory), 1)
    return Tile(block_m, 128, split_k_for(n, k, 128, device.multiprocessors), 2 if group >= 64 else 4, stages)


def split_k_for(n: int, k: int, block_n: int, multiprocessors: int) -> int:
    """Programs that share an output tile: at least two per multiprocessor where K allows, with little left over.

    Four chunks at least for each program: with fewer its pipeline never fills. A multiprocessor's time is taken to be
    the number of its programs times their chunks, START_COST included.
    """
    tiles, chunks = -(-n // block_n), -(-k // CHUNK)
    # the same number of chunks for each, so that no program is without work
    splits = sorted({-(-chunks // -(-chunks // split)) for split in range(1, max(1, chunks // 4) + 1)})
    filling = [split for split in splits if tiles * split >= 2 * multiprocessors] or splits[-1:]

    def cost(split: int) -> int:
        return -(-tiles * split // multiprocessors) * (-(-chunks // split) + START_COST)

    return min(filling, key=cost)


def pipeline_bytes(block_m: int, block_n: int, num_stages: int, bits: int = 4) -> int:
    """Shared memory of the buffers that a kernel's loads run ahead into: words and x of one chunk, num_stages times."""
    return num_stages * (block_n * CHUNK * bits // 8 + block_m * CHUNK * 2)


@cache
def read_table(family: str) -> tuple[CardTiles, ...]:
    """The cards of a family's table; none for a family without one."""
    path = TABLES / f"{family}.json"
    return parse_table(path) if path.exists() else ()


def parse_table(path: Path) -> tuple[CardTiles, ...]:
    """Read one table. ValueError names the file, the entry and the field that is missing, unknown or out of range."""
    try:
        cards = json.loads(path.read_text())["cards"]
        return tuple(_parse_card(path, card) for card in cards)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a tile table ({error!r}); make it again with python -m benchmarks.tune"
        ) from None


def _parse_card(path: Path, card: dict[str, Any]) -> CardTiles:
    count, measured = card["multiprocessors"], card["measured"]
    if type(count) is not int or count < 1:
        raise ValueError(f"{path}, {card.get('device')}: multiprocessors is {count!r}, expected a number of 1 or more")
    if type(measured) is not bool:
        raise ValueError(f"{path}, {card.get('device')}: measured is {measured!r}, expected true or false")
    entries: dict[Key, Tile] = {}
    for index, entry in enumerate(card["entries"]):
        where = f"{path}, {card.get('device')}, entry {index}"
        key, tile = _parse_entry(where, entry)
        if key in entries:
            raise ValueError(f"{where}: {dict(zip(_KEY, key, strict=True))} is listed twice")
        entries[key] = tile
    return CardTiles(count, measured, entries)


_KEY = ("block_m", "n", "k", "group", "bits")
_CHOICES = {
    "block_m": (*TURING_ROWS, *DECODE_ROWS, *PREFILL_ROWS),
    "block_n": (64, 128),  # a weight is padded to whole tiles of 128 outputs
    "bits": (4, 8),
    "num_warps": (1, 2, 4, 8),
}


def _parse_entry(where: str, entry: dict[str, Any]) -> tuple[Key, Tile]:
    known = {*_KEY, *(field.name for field in fields(Tile))}
    if set(entry) != known:
        raise ValueError(f"{where}: fields {sorted(set(entry) ^ known)} are missing or unknown")
    for name, value in entry.items():
        choices = _CHOICES.get(name)
        if type(value) is not int or value < 1 or (choices and value not in choices):
            raise ValueError(f"{where}: {name} is {value!r}, expected {choices or 'a number of 1 or more'}")
    if entry["block_m"] in PREFILL_ROWS and entry["split_k"] != 1:
        raise ValueError(f"{where}: split_k is {entry['split_k']}, the prefill kernel takes 1")
    block_m, n, k, group, bits = (entry[name] for name in _KEY)
    return (block_m, n, k, group, bits), Tile(**{field.name: entry[field.name] for field in fields(Tile)})
