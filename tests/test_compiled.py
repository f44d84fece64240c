"""What the GPU kernels compile to for every architecture, without a GPU: the bounds of docs/kernels.md.

Bounds and what they are computed from, the machine code's counts, are stated here, not read from benchmarks.compiled.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs the triton package, which Linux has")

from kernels.gpu.tiles import read_table  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
FAMILIES = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_120")
BOUNDED = tuple(name for name in FAMILIES if name != "sm_80")  # where instructions are bounded
# bytes that one program may use (CUDA C++ Programming Guide, technical specifications by compute capability)
SHARED = {
    "sm_75": 65_536,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_120": 101_376,
    "sm_80": 166_912,
    "sm_87": 166_912,
    "sm_90": 232_448,
}
# instructions a weight by rows, and an element of keys and values; far fewer would mean that the count is wrong
WEIGHT_LIMITS = {8: 2.5, 16: 3.0}
TURING_LIMITS = {1: 4.0, 2: 4.0, 4: 4.0}
CACHE_LIMITS = {"float16": 5.0, "bfloat16": 5.0, "int8": 6.0}
CONVERSIONS = {"I2F", "I2FP", "I2HP"}  # integer to float


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Compiled in a process of its own, as this one has the kernels loaded for the interpreter."""
    folder = tmp_path_factory.mktemp("compiled")
    files = {name: folder / f"{name}.json" for name in ("json", "details")}
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    command = [sys.executable, "-m", "benchmarks.compiled", "--quick", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert files["details"].exists(), run.stderr[-2000:]
    assert run.returncode == 0, run.stdout[-2000:]
    found: list[dict[str, Any]] = json.loads(files["details"].read_text())
    summary = json.loads(files["json"].read_text())["kernels"]
    assert sum(line["compilations"] for line in summary) == len(found) > 200
    return found


def products(compiled: list[dict[str, Any]], architecture: str | None = None, **of: Any) -> list[dict[str, Any]]:
    """Int4 and int8 products whose main loop was read, with what `of` says of their projection."""
    found = [
        entry
        for entry in compiled
        if entry["projection"]
        and entry["loop"]
        and architecture in (None, entry["architecture"])
        and all(entry["projection"][name] == value for name, value in of.items())
    ]
    assert found
    return found


def weights_a_turn(entry: dict[str, Any]) -> float:
    """Weights that one of a warp's 32 threads consumes in a turn: what the tensor cores multiply, by the rows of x.

    On Turing a pair of weights takes one float16 operation to unpack, and one for each row.
    """
    if entry["architecture"] == "sm_75":
        return entry["loop"]["counts"]["HFMA2"] * 2 / (1 + entry["tile"]["block_m"])
    return entry["loop"]["products"] / entry["tile"]["block_m"] / 32


def loaded(entry: dict[str, Any], *sizes: int, name: str = "LDG") -> int:
    """Bytes that a turn loads from global memory in loads of these sizes; "LDGSTS" goes to shared memory."""
    return sum(size * entry["loop"]["loads"].get(f"{name} {size}", 0) for size in sizes)


def test_nothing_spills_and_shared_memory_is_what_the_cards_have(compiled: list[dict[str, Any]]) -> None:
    for entry in compiled:
        assert entry["spilled"] == 0, entry["case"]
        assert entry["shared"] <= SHARED[entry["architecture"]], entry["case"]


@pytest.mark.parametrize("architecture", BOUNDED)
def test_a_weight_costs_few_instructions(compiled: list[dict[str, Any]], architecture: str) -> None:
    published = {"bits": 4, "group": 128, "zeros": False, "dtype": "torch.float16"}
    found = products(compiled, architecture, **published)
    for block_m, limit in (TURING_LIMITS if architecture == "sm_75" else WEIGHT_LIMITS).items():
        bounded = [entry for entry in found if entry["tile"]["block_m"] == block_m]
        assert bounded
        for entry in bounded:
            assert 1.5 < entry["loop"]["length"] / weights_a_turn(entry) <= limit, entry["case"]


@pytest.mark.parametrize(
    ("architecture", "cache"),
    [
        (name, cache)
        for name in ("sm_75", "sm_86", "sm_89", "sm_90", "sm_120")
        for cache in CACHE_LIMITS
        if (name, cache) != ("sm_75", "bfloat16")
    ],
)
def test_an_element_of_the_cache_costs_few_instructions(
    compiled: list[dict[str, Any]], cache: str, architecture: str
) -> None:
    kernel = f"attention, decode, {cache} cache"
    found = [entry for entry in compiled if entry["kernel"] == kernel and entry["architecture"] == architecture]
    assert found
    for entry in found:
        elements = (loaded(entry, 16) + loaded(entry, 16, name="LDGSTS")) / (1 if cache == "int8" else 2)
        assert 2.5 < entry["loop"]["length"] / elements <= CACHE_LIMITS[cache], entry["case"]


def test_levels_become_floats_without_a_conversion_instruction(compiled: list[dict[str, Any]]) -> None:
    for bits in (4, 8):
        for entry in products(compiled, bits=bits):
            counts = entry["loop"]["counts"]
            assert not CONVERSIONS & set(counts), entry["case"]
            tensor_cores = counts.get("HMMA", 0) + counts.get("HGMMA", 0) > 0
            assert tensor_cores == (entry["architecture"] != "sm_75"), entry["case"]


def test_weights_are_read_sixteen_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    for entry in products(compiled):
        words = weights_a_turn(entry) * entry["projection"]["bits"] / 8  # bytes
        # tiles of words and x go to shared memory, then only scales, zeros and sums go to registers
        name = "LDGSTS" if any(load.startswith("LDGSTS") for load in entry["loop"]["loads"]) else "LDG"
        wide, narrow = loaded(entry, 16) + loaded(entry, 16, name="LDGSTS"), loaded(entry, 4, 8, name=name)
        assert wide >= words > narrow, entry["case"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_of_the_tile_tables_was_compiled(compiled: list[dict[str, Any]], family: str) -> None:
    names = ("block_m", "block_n", "num_warps", "num_stages")
    found = {
        (*(entry["tile"][name] for name in names), entry["tile"]["split_k"] > 1)
        for entry in compiled
        if entry["tile"] and entry["architecture"] == family
    }
    cards = read_table(family)
    assert cards
    for card in cards:
        for tile in card.entries.values():
            assert (*(getattr(tile, name) for name in names), tile.split_k > 1) in found
