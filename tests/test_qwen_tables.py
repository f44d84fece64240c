"""benchmarks.qwen_tables puts figures beside the published ones only with what was measured said."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.qwen_tables import MEMORIES, PUBLISHED, SPEEDS, main, measure, tables
from qvl_edge.bench import Bench
from qvl_edge.machine import cpu_name

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def cache(vit_cache: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(vit_cache.parent))
        yield


def run(tokens_per_s: float, peak: int, measured: int, asked: int) -> dict:
    return {"tokens_per_s": tokens_per_s, "peak_bytes": {"peak host": peak}, "measured": measured, "asked": asked}


ABOUT = {"model": "Qwen-VL int4 g128", "params": 7_064_448}
WHOLE = {
    MEMORIES[0]: run(1.0, 10**9, 1792, 1792),
    SPEEDS[0]: run(40.0, 2 * 10**9, 1792, 1792),
    SPEEDS[1]: run(30.0, 3 * 10**9, 7934, 7934),
    MEMORIES[1]: run(30.0, 3 * 10**9, 7934, 7934),
}


def test_a_whole_run_stands_beside_the_published_figures() -> None:
    speed, memory, _ = tables(WHOLE, ABOUT, "a card").split("\n\n")
    assert "| Int4, published | 9.66 B | A100-SXM4-80G | 37.79 | 34.34 |" in speed
    assert "| Qwen-VL int4 g128 | 7.06 M | a card | 40.00 | 30.00 |" in speed
    assert "| Int4, published | 9.66 B | A100-SXM4-80G | 11.82 GB | 17.23 GB |" in memory
    assert "| Qwen-VL int4 g128, host | 7.06 M | a card | 1.00 GB | 3.00 GB |" in memory
    assert "only" not in speed + memory
    columns = {line.count("|") for line in (*speed.splitlines(), *memory.splitlines())}
    assert columns == {6}


def test_a_run_that_was_cut_short_says_so() -> None:
    cut = WHOLE | {SPEEDS[1]: run(30.0, 10**9, 64, 7934), MEMORIES[1]: run(30.0, 10**9, 64, 7934)}
    speed, memory, _ = tables(cut, ABOUT, "a card").split("\n\n")
    assert "| 40.00 | 30.00 (only 64 of 7934 tokens) |" in speed
    assert "| 1.00 GB | 1.00 GB (only 64 of 7934 tokens) |" in memory


def test_what_is_not_known_is_not_made_up() -> None:
    assert all(len(values) == 4 for values in PUBLISHED.values())
    speed, memory, _ = tables(WHOLE, ABOUT, "a card").split("\n\n")
    for name, values in PUBLISHED.items():
        assert (name in speed) == any(values[:2]) and (name in memory) == any(values[2:])


@pytest.mark.parametrize(
    ("context", "tokens", "encoded", "generated"),
    [(1200, 5, 258, (5, 5)), (1200, 300, 300, (300, 300)), (400, None, 399, (142, 142))],
)
def test_exactly_as_many_tokens_are_generated_as_is_said(
    context: int, tokens: int | None, encoded: int, generated: tuple[int, int], make_checkpoint: Callable[..., Path]
) -> None:
    bench = Bench(str(make_checkpoint("model")), {"device": "cpu", "max_context": context})
    asked: list[tuple[int, int]] = []
    answer = bench.runtime.generate_ids

    def watch(ids, starts, images, **generation):
        found = answer(ids, starts, images, **generation)
        assert len(images) == 1 and not found.usage.cached_images and not found.usage.cached_tokens
        asked.append((len(ids), len(found.token_ids)))
        return found

    bench.runtime.generate_ids = watch  # type: ignore[method-assign]
    found = measure(bench, tokens=tokens)
    assert asked[1:] == [(encoded, 1), (258, generated[0]), (258, generated[1])]
    assert [found[column]["measured"] for column in (*MEMORIES[:1], *SPEEDS)] == [encoded, *generated]
    assert [found[column]["asked"] for column in (*MEMORIES[:1], *SPEEDS)] == [1792, 1792, 7934]
    assert all(found[column]["tokens_per_s"] > 0 and found[column]["peak_bytes"]["peak host"] > 0 for column in found)


def test_the_command_prints_and_saves(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = str(make_checkpoint("model")), tmp_path / "tables.json"
    main([path, "--tokens", "4", "--device", "cpu", "--max-context", "600", "--output", str(out)])
    said = capsys.readouterr().out
    assert "(only 4 of 7934 tokens)" in said and "Peak Usage for Encoding 2048 Tokens" in said
    result = json.loads(out.read_text())
    assert result["runs"][SPEEDS[0]]["measured"] == 4 and {"device", "versions", "commit", "date"} <= set(result)
    assert result["device"] == cpu_name() and result["options"]["device"] == "cpu"


def test_a_context_without_room_is_said(make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit, match="max_context is 100"):
        main([str(make_checkpoint("model")), "--device", "cpu", "--max-context", "100"])
    with pytest.raises(SystemExit, match="neither a local folder"):
        main(["no/such/folder", "--device", "cpu"])
