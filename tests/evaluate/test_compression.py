"""benchmarks.compression: its figures are what they say, and an interrupted run ends in the same result."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compression, plot
from benchmarks.compression import DEFAULT, FLOAT, VARIANTS
from qvl_edge import Runtime
from qvl_edge.bundle import Bundle
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.evaluate.predict import content_of
from qvl_edge.evaluate.synthetic import SYNTHETIC
from qvl_edge.machine import commit

pytestmark = pytest.mark.slow

EXACT = 1e-4  # log-probabilities in float32, prompts cut into other chunks
CHOSEN = "8g"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compression")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compression, "CALIBRATION_SCENES", 4)
        compression.main(["--scenes", "4", "--only", CHOSEN, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def result(out: Path) -> dict:
    return json.loads((out / "compression.json").read_text())


def test_float_diverges_from_itself_by_nothing_and_the_others_by_something(result: dict) -> None:
    kept = {row["variant"]: row for row in result["variants"]}
    assert [*kept] == [FLOAT, DEFAULT, *(one.name for one in VARIANTS if CHOSEN in one.name)]
    assert kept[FLOAT]["kl"]["value"] == 0 and kept[FLOAT]["same_token"] == 1 and not kept[FLOAT]["answers_changed"]
    for row in result["variants"][1:]:
        assert 0 < row["kl"]["value"] < 1 and row["same_token"] > 0.5 and row["perplexity"] > 1
        assert row["bytes"] < kept[FLOAT]["bytes"]
    assert kept[DEFAULT]["kl_over_default"]["value"] == 0


def test_the_perplexity_is_that_of_the_runtime_s_own_scores(out: Path, vit_cache: Path) -> None:
    runtime = Runtime.from_pretrained(compression.SMALL_MODEL, cache_dir=vit_cache)
    items = {item.id: item for item in SYNTHETIC.read(out / "scenes-4/scenes.jsonl", None)}
    lines = [json.loads(line) for line in next(out.glob(f"*-4/{FLOAT}.divergence.jsonl")).read_text().splitlines()]
    assert {line["id"].split("-")[0] for line in lines} == {"0", "3"}
    for line in lines:
        item = items[line["id"]]
        scores = runtime.score(content_of(item), item.reference["answer"], chat_format="chatml")
        assert line["tokens"] == len(scores) and line["nll"] == pytest.approx(-sum(scores), abs=EXACT)


def test_run_again_it_measures_nothing_anew(out: Path, result: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(compression.Divergence, "_logprobs", refuse)
    monkeypatch.setattr(compression.Predictor, "predict", refuse)
    monkeypatch.setattr(compression, "quantize_checkpoint", refuse)
    compression.main(["--scenes", "4", "--only", CHOSEN, "--out", str(out)])
    assert json.loads((out / "compression.json").read_text())["variants"] == result["variants"]


def test_the_table_and_the_picture_hold_every_variant(out: Path, result: dict) -> None:
    lines = compression.summary(result["variants"]).splitlines()
    assert len(lines) == 2 + len(result["variants"]) and len({line.count("|") for line in lines}) == 1
    drawing = ElementTree.parse(out / "compression.svg").getroot()
    words = {element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")}
    shown = [row["variant"] for row in result["variants"] if row["variant"] != FLOAT]
    assert set(shown) <= words
    for axes in plot.compression(result).axes:
        ((points, _, (intervals,)),) = axes.containers
        values, rows = points.get_data()
        assert list(rows) == list(range(len(shown))) and len(intervals.get_segments()) == len(shown)
        low, high = axes.get_xlim()
        assert all(low < value < high for value in values)


def test_work_is_kept_under_the_checkpoint_the_commit_and_the_number_of_scenes(out: Path) -> None:
    mark = f"{Checkpoint(compression.SMALL_MODEL).fingerprint[:12]}-{commit()}"
    assert {path.name for path in out.iterdir() if path.is_dir()} == {mark, f"{mark}-4", "scenes-4"}


def test_a_variant_whose_build_was_killed_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "CALIBRATION_SCENES", 2)
    builder = compression.VariantBuilder(Checkpoint(compression.SMALL_MODEL), tmp_path)
    quantize = compression.quantize_checkpoint

    class Killed(Exception):
        pass

    def die(*given: Any, **options: Any) -> None:
        def progress(event: Any) -> None:
            if event.layer is not None:
                raise Killed

        quantize(*given, **options, progress=progress)

    (variant,) = (one for one in VARIANTS if one.name == DEFAULT)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(compression, "quantize_checkpoint", die)
        builder.path(variant)
    assert any(tmp_path.iterdir())
    Bundle.open(builder.path(variant), verify=True)


def test_so_few_scenes_that_there_is_no_interval_are_refused(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        compression.main(["--scenes", "3", "--out", str(tmp_path / "out")])
    assert "4 or more" in capsys.readouterr().err and not (tmp_path / "out").exists()
