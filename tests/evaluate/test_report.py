"""A report says what its numbers say, and its page opens nothing and shows what went wrong."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from qvl_edge.evaluate import report
from qvl_edge.evaluate.report import Scored
from qvl_edge.evaluate.task import Item, Metric, Prediction, QualityDataError, Task, by_item

ABOUT = {"data": {"file": "d"}, "device": "none", "versions": {}, "commit": "c", "date": "d"}


def score(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    return [by_item("right", items, [float(predictions[item.id].text == item.reference) for item in items])]


def read(file: Path, images: Path | None) -> list[Item]:
    raise QualityDataError("not read here")


TASK = Task("t", "T", read, score, "nowhere", totals=lambda metrics: {"sum": sum(metrics[0].values)})


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    Image.new("RGB", (600, 300), (10, 120, 200)).save(tmp_path / "a.png")
    words = ["one", "two", "three", "<b>four</b>"]
    return [
        Item(f"q{index}", (tmp_path / "a.png", f"say {word}"), word, group="odd" if index % 2 else "even")
        for index, word in enumerate(words)
    ]


def scored(items: Sequence[Item], name: str, *answers: str) -> Scored:
    predictions = {item.id: Prediction(item.id, text) for item, text in zip(items, answers, strict=True)}
    return Scored.of(TASK, items, predictions, {"name": name})


def test_rows_hold_means_by_group_and_paired_differences(items: list[Item]) -> None:
    model, other = scored(items, "int4", "one", "x", "y", "z"), scored(items, "float", "one", "two", "y", "<b>four</b>")
    found = report.to_dict(TASK, items, model, other, **ABOUT)
    whole, even, odd = found["rows"]
    assert (whole["group"], even["group"], odd["group"]) == (None, "even", "odd")
    assert [row["n"] for row in found["rows"]] == [4, 2, 2]
    assert (whole["model"]["value"], whole["against"]["value"]) == (25.0, 75.0)
    assert whole["difference"]["mean"]["value"] == -50.0
    assert (whole["difference"]["better"], whole["difference"]["worse"]) == (0, 2)
    assert (odd["model"]["value"], odd["against"]["value"], even["difference"]["mean"]["value"]) == (0.0, 100.0, 0.0)
    assert found["totals"] == {"model": {"sum": 1.0}, "against": {"sum": 3.0}}
    lines = report.table(found).splitlines()
    assert lines[0] == "| metric | n | int4 | float | difference | better / worse | p |"
    assert lines[2].startswith("| right | 4 | 25.00 [") and lines[-1] == "| sum |  | 1.00 | 3.00 | -2.00 |  |  |"
    assert len({line.count("|") for line in lines}) == 1


def test_what_was_lost_comes_before_what_neither_had(items: list[Item]) -> None:
    model, other = scored(items, "int4", "one", "x", "y", "z"), scored(items, "float", "one", "two", "y", "<b>four</b>")
    assert report.worst(items, model, other) == ["q1", "q3", "q2"]
    assert report.worst(items, model, None) == ["q1", "q2", "q3"]
    assert report.worst(items, scored(items, "a", *(str(item.reference) for item in items)), None) == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_is_whole_and_escapes_what_models_and_data_say(items: list[Item], language: str) -> None:
    said = "<script>alert(1)</script><ref>it</ref><box>(100,100),(900,900)</box>"
    model = scored(items, "int4", "one", said, "y", "z")
    found = report.to_dict(TASK, items, model, None, **ABOUT)
    page = report.page(found, items, model, None, language=language)
    assert f'lang="{language}"' in page and report.WORDS[language]["worst"] in page
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;four&lt;/b&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 3
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "http" not in page


def test_the_picture_of_an_answer_with_a_box_has_it_drawn(items: list[Item]) -> None:
    plain, boxed = (
        report.page(report.to_dict(TASK, items[:1], one, None, **ABOUT), items[:1], one, None)
        for one in (scored(items[:1], "m", "x"), scored(items[:1], "m", "<box>(100,100),(900,900)</box>"))
    )
    pictures = [re.search(r"base64,([^\"]+)", page) for page in (plain, boxed)]
    assert pictures[0] and pictures[1] and pictures[0][1] != pictures[1][1]


def test_a_box_without_tags_as_raw_answers_have_it_is_drawn_too(items: list[Item]) -> None:
    tagged, bare = (
        report.page(report.to_dict(TASK, items[:1], one, None, **ABOUT), items[:1], one, None)
        for one in (
            scored(items[:1], "m", "<box>(100,100),(900,900)</box>"),
            scored(items[:1], "m", "(100,100),(900,900)"),
        )
    )
    pictures = [re.search(r"base64,([^\"]+)", page) for page in (tagged, bare)]
    assert pictures[0] and pictures[1] and pictures[0][1] == pictures[1][1]


def test_perplexity_is_shown_with_its_interval_and_of_two_models_the_quotient() -> None:
    values = ([-1.0, -1.2, -0.8], [-1.1, -1.3, -0.8])
    model, other = (
        Scored({"name": name}, {}, [Metric("p", v, list("abc"), [["a"]] * 3, (), 1.0, [1.0] * 3, "perplexity")], {})
        for name, v in zip(("int4", "float"), values, strict=True)
    )
    (row,) = report.rows(model, other)
    assert row["model"]["value"] == pytest.approx(math.exp(1.0)) and row["against"]["value"] == pytest.approx(
        math.exp(3.2 / 3)
    )
    assert row["model"]["low"] < row["model"]["value"] < row["model"]["high"]
    mean = row["difference"]["mean"]
    assert mean["value"] == pytest.approx(math.exp(-0.2 / 3)) and mean["low"] < mean["value"] < mean["high"]
    assert (row["difference"]["better"], row["difference"]["worse"]) == (2, 0)


def test_what_has_no_interval_is_null_in_json_and_no_nan_in_the_table(items: list[Item]) -> None:
    def score(items, predictions):
        return [by_item("score", items, [0.3] * len(items))]

    task = Task("t", "T", read, score, "nowhere")
    one = Scored.of(task, items[:1], {items[0].id: Prediction(items[0].id, "x")}, {"name": "m"})
    found = report.to_dict(task, items[:1], one, one, **ABOUT)
    assert found["rows"][0]["model"] == {"value": 30.0, "low": None, "high": None}
    json.loads(json.dumps(found, allow_nan=False))
    assert "nan" not in report.table(found)


def test_equal_scores_are_said_to_be_equal_where_no_interval_says_how_sure_that_is(items: list[Item]) -> None:
    def score(items, predictions):
        return [by_item("score", items, [0.3, 0.5, 0.7, 1.0])]

    task = Task("t", "T", read, score, "nowhere")
    same = Scored.of(task, items, {item.id: Prediction(item.id, "x") for item in items}, {"name": "m"})
    assert "| = |" in report.table(report.to_dict(task, items, same, same, **ABOUT))


def test_models_scored_on_different_items_are_not_compared(items: list[Item]) -> None:
    model, other = scored(items, "a", *"abcd"), scored(items[:3], "b", *"abc")
    with pytest.raises(ValueError, match="different units"):
        report.rows(model, other)


def test_both_languages_have_the_same_words() -> None:
    assert report.WORDS["en"].keys() == report.WORDS["zh"].keys()
