"""The soak benchmark in small: reuse over many turns gives the answers of fresh runs, and a difference ends it."""

from pathlib import Path

import pytest

import qvl_edge.demo
from benchmarks.soak import soak
from qvl_edge import Runtime

pytestmark = pytest.mark.slow

SMALL = Path(qvl_edge.demo.__file__).parent / "checkpoint"


@pytest.fixture(scope="module")
def runtimes(vit_cache: Path) -> list[Runtime]:
    return [Runtime.from_pretrained(SMALL, device="cpu", cache_dir=vit_cache, max_context=4096) for _ in range(2)]


def test_turns_about_many_pictures_give_the_answers_of_fresh_runs(runtimes: list[Runtime]) -> None:
    found = soak(*runtimes, count=12, images=40, compare=1)
    assert found["compared"] == 12
    assert 0.3 < found["reused_share"] < 1


def test_an_answer_that_differs_ends_the_soak(runtimes: list[Runtime], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, fresh = runtimes
    real = fresh.answer
    monkeypatch.setattr(fresh, "answer", lambda query, history, **options: real("Something else", **options))
    with pytest.raises(SystemExit, match="turn 0"):
        soak(runtime, fresh, count=3, images=2, compare=1)
