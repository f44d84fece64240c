"""MME's two folders, and its scores against lmms-eval's sums and by hand where that one reads answers differently."""

import json
from pathlib import Path

import pytest

from qvl_edge.evaluate.mme import MME, read_yes_no
from qvl_edge.evaluate.task import Item, Prediction, QualityDataError

from .miniature import COUNT, Miniature, make

GOLDEN = json.loads((Path(__file__).parents[1] / "data/scoring/yes_no.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-6  # sums of a few hundred quotients in float64
SUBTASKS = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)


@pytest.fixture
def miniature(tmp_path: Path) -> Miniature:
    return make("mme", tmp_path)


def test_both_forms_of_the_data_give_the_same_items(miniature: Miniature, tmp_path: Path) -> None:
    items = MME.read(miniature.images, None)
    results = tmp_path / "Your_Results"
    results.mkdir()
    for subtask in ("existence", "landmark"):
        lines = [
            f"{item.images[0].name}\t{item.content[1].strip()}\t{item.reference.title()}\n"
            for item in items
            if item.group == subtask
        ]
        (results / f"{subtask}.txt").write_text("".join(lines), encoding="utf-8")
    assert MME.read(results, miniature.images) == items


def test_accuracy_plus_needs_both_questions_of_an_image(miniature: Miniature) -> None:
    items = MME.read(miniature.images, None)
    said = {item.id: Prediction(item.id, f"{item.reference.title()}, it is.") for item in items}
    first = items[0]
    said[first.id] = Prediction(first.id, "No.")
    for item in items[2 * COUNT :]:
        said[item.id] = Prediction(item.id, "Yes, there is.")
    metrics = MME.score(items, said)
    assert [metric.name for metric in metrics] == ["accuracy", "accuracy+"]
    assert sum(metrics[0].values) == 2 * COUNT - 1 + COUNT  # of landmark only the questions with yes are right
    assert list(metrics[1].values) == [0.0] + [1.0] * (COUNT - 1) + [0.0] * COUNT
    assert metrics[1].items[0] == [items[0].id, items[1].id]
    existence = 100 * (2 * COUNT - 1) / (2 * COUNT) + 100 * (COUNT - 1) / COUNT
    assert MME.totals is not None
    assert MME.totals(metrics) == pytest.approx(
        {"perception (2 of 10 subtasks)": existence + 50, "existence": existence, "landmark": 50}
    )


def test_all_subtasks_make_mmes_full_scores(miniature: Miniature) -> None:
    for subtask in SUBTASKS:
        if not (miniature.images / subtask).exists():
            (miniature.images / subtask).symlink_to(miniature.images / "existence")
    items = MME.read(miniature.images, None)
    metrics = MME.score(items, {item.id: Prediction(item.id, item.reference) for item in items})
    assert MME.totals is not None
    assert MME.totals(metrics) == {"perception": 2000, "cognition": 800, **dict.fromkeys(SUBTASKS, 200)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Is it? Please answer yes or no.\tYes\n", "line 1: expected two questions on 0.jpg in a row, found one"),
        ("Is it?\tYes\nIs it not?\tPerhaps\n", "line 2, field 'answer': expected Yes or No, found 'perhaps'"),
        ("Is it?\tYes\nIs it not? No\n", "line 2 has 1 cells; expected question, answer with tabs between"),
    ],
)
def test_a_wrong_line_is_named(miniature: Miniature, text: str, message: str) -> None:
    file = miniature.images / "existence" / "0.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(QualityDataError) as error:
        MME.read(miniature.images, None)
    assert f"{file}, {message}" in str(error.value)


def test_a_missing_image_and_a_folder_of_something_else_are_named(miniature: Miniature) -> None:
    image = miniature.images / "landmark" / "images" / "1.jpg"
    image.unlink()
    with pytest.raises(QualityDataError, match="image 'landmark/1.jpg' is not at .*--images DIR"):
        MME.read(miniature.images, None)
    with pytest.raises(QualityDataError, match="has no subtask of MME"):
        MME.read(miniature.images / "landmark", None)


def totals(rows: list[tuple[str, str, str, str]]) -> dict[str, float]:
    """MME's sums of (subtask, picture, answer, truth), two rows a picture in a row."""
    items, predictions = [], {}
    for number, (subtask, picture, answer, truth) in enumerate(rows):
        items.append(Item(str(number), ("?",), truth.lower(), group=subtask, unit=f"{subtask}/{picture}"))
        predictions[str(number)] = Prediction(str(number), answer)
    assert MME.totals is not None
    return MME.totals(MME.score(items, predictions))


def test_the_totals_are_those_of_lmms_eval() -> None:
    rows = sorted(GOLDEN["items"], key=lambda row: row[:2])
    found = totals(rows)
    assert {part: found[part] for part in GOLDEN["totals"]} == pytest.approx(GOLDEN["totals"], abs=TOLERANCE)


def test_a_picture_counts_in_accuracy_plus_only_if_both_answers_are_right() -> None:
    rows = [("OCR", "a", "Yes", "Yes"), ("OCR", "a", "No", "No"), ("OCR", "b", "Yes", "Yes"), ("OCR", "b", "Yes", "No")]
    assert totals(rows) == pytest.approx({"perception (1 of 10 subtasks)": 125.0, "OCR": 125.0}, abs=TOLERANCE)


def test_all_right_is_2000_and_800_and_silence_is_0() -> None:
    right = [(name, "a", said, truth) for name in SUBTASKS for said, truth in (("yes", "Yes"), ("NO.", "No"))]
    silent = [(name, picture, said, truth) for name, picture, _, truth in right for said in ("",)]
    for rows, most in ((right, (2000.0, 800.0)), (silent, (0.0, 0.0))):
        found = totals(rows)
        assert (found["perception"], found["cognition"]) == most


@pytest.mark.parametrize(
    ("text", "said"),
    [("Yes", "yes"), ("no, it is not", "no"), ("None", "no"), ("A yes", "other"), ("\nYes", "yes"), ("y", "other")],
)
def test_the_first_four_characters_decide(text: str, said: str) -> None:
    assert read_yes_no(text) == said
