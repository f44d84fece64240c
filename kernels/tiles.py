"""Which tile a GPU kernel of the int4 family uses: read from tables per GPU family, or by rule where no table knows.

tiles/sm_XX.json holds {"device", "measured", "versions", "commit", "date", "entries": [{"block_m", "n", "k", "group",
"bits", "block_n", "split_k", "num_warps", "num_stages"}, …]}; `measured` is false where nobody has run the tuner
(python -m benchmarks.tune) on such a card. Nothing is ever tuned while a model runs.
"""

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLES = Path(__file__).with_name("tiles")
DECODE_ROWS = (8, 16)  # block_m of the decode kernel
PREFILL_ROWS = (32, 64, 128)  # block_m of the prefill kernel
CHUNK = 128  # input channels of one step of a kernel
SHARED = 101_376  # bytes a program may use on consumer cards (sm_86, sm_89, sm_120)


@dataclass(frozen=True)
class Tile:
    """One program's outputs (block_n) and rows (block_m), programs that share an output tile, and launch options."""

    block_m: int
    block_n: int
    split_k: int
    num_warps: int
    num_stages: int


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


INTERPRETER = DeviceKey((0, 0), 1, SHARED)


@cache
def device_key(device: torch.device) -> DeviceKey:
    """The key of a CUDA device, asked for once; of the interpreter for the CPU."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", SHARED)
    return DeviceKey((properties.major, properties.minor), properties.multi_processor_count, shared)


def block_m_for(rows: int) -> int:
    """Rows of one program: the smallest block that holds `rows`, or the largest."""
    return next((block for block in (*DECODE_ROWS, *PREFILL_ROWS) if rows <= block), PREFILL_ROWS[-1])


def tile_for(rows: int, n: int, k: int, group: int, *, bits: int = 4, device: DeviceKey) -> Tile:
    """The tile for x (rows, k) and a weight (n, k): the family's table, or the rule for what it does not list."""
    block_m = block_m_for(rows)
    found = read_table(device.family).get((block_m, n, k, group, bits))
    return found or default_tile(block_m, n, k, bits, device)


def default_tile(block_m: int, n: int, k: int, bits: int, device: DeviceKey) -> Tile:
    """A safe tile for any card: enough programs to fill it about twice, pipelines that fit its shared memory.

    Two warps of a 128-output tile share each fragment of x among 64 rows of the weight: 1.9 instructions a weight for 8
    rows where four warps take 2.4 (sm_86, compiled by triton 3.7.1).
    """
    if block_m in PREFILL_ROWS:
        stages = next((s for s in (3, 2) if pipeline_bytes(block_m, 128, s, bits) <= device.shared_memory), 1)
        return Tile(block_m, 128, 1, 8 if block_m == 128 else 4, stages)
    tiles, chunks = -(-n // 128), -(-k // CHUNK)
    # four chunks at least for each program: with fewer its pipeline never fills
    split_k = max(1, min(-(-2 * device.multiprocessors // tiles), chunks // 4))
    stages = next((s for s in (4, 3, 2) if 2 * pipeline_bytes(block_m, 128, s, bits) <= device.shared_memory), 1)
    return Tile(block_m, 128, split_k, 2, stages)


def pipeline_bytes(block_m: int, block_n: int, num_stages: int, bits: int = 4) -> int:
    """Shared memory of the buffers that a kernel's loads run ahead into: words and x of one chunk, num_stages times."""
    return num_stages * (block_n * CHUNK * bits // 8 + block_m * CHUNK * 2)


@cache
def read_table(family: str) -> dict[tuple[int, int, int, int, int], Tile]:
    """Entries of a family's table by (block_m, n, k, group, bits); empty for a family without one."""
    path = TABLES / f"{family}.json"
    return parse_table(path) if path.exists() else {}


def parse_table(path: Path) -> dict[tuple[int, int, int, int, int], Tile]:
    """Read one table. ValueError names the file, the entry and the field that is missing, unknown or out of range."""
    try:
        entries = json.loads(path.read_text())["entries"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no tile table ({error!r}); make it again with python -m benchmarks.tune") from None
    return dict(_parse_entry(path, index, entry) for index, entry in enumerate(entries))


_KEY = ("block_m", "n", "k", "group", "bits")
_CHOICES = {
    "block_m": (*DECODE_ROWS, *PREFILL_ROWS),
    "block_n": (64, 128),  # a weight is padded to whole tiles of 128 outputs
    "bits": (4, 8),
    "num_warps": (1, 2, 4, 8),
}


def _parse_entry(path: Path, index: int, entry: dict[str, Any]) -> tuple[tuple[int, int, int, int, int], Tile]:
    known = {*_KEY, *(field.name for field in fields(Tile))}
    if set(entry) != known:
        raise ValueError(f"{path}, entry {index}: fields {sorted(set(entry) ^ known)} are missing or unknown")
    for name, value in entry.items():
        choices = _CHOICES.get(name)
        if type(value) is not int or value < 1 or (choices and value not in choices):
            raise ValueError(f"{path}, entry {index}: {name} is {value!r}, expected {choices or 'a number from 1 on'}")
    if entry["block_m"] in PREFILL_ROWS and entry["split_k"] != 1:
        raise ValueError(f"{path}, entry {index}: split_k is {entry['split_k']}, the prefill kernel takes 1")
    return tuple(entry[name] for name in _KEY), Tile(**{f.name: entry[f.name] for f in fields(Tile)})
