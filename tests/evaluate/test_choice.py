"""MMBench's file and its circular evaluation."""

import base64
import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from qvl_edge.evaluate import TASKS, records
from qvl_edge.evaluate.task import Item, Prediction, QualityDataError

from .miniature import Miniature, make

MMBENCH = TASKS["mmbench"]
HEADER = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]


@pytest.fixture
def miniature(tmp_path: Path) -> Miniature:
    return make("mmbench", tmp_path)


def rewrite(miniature: Miniature, rows: Sequence[dict[str, str]]) -> list[Item]:
    with miniature.data.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HEADER, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return MMBENCH.read(miniature.data, miniature.images)


def rows_of(miniature: Miniature) -> list[dict[str, str]]:
    with miniature.data.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def choose(items: Sequence[Item], choices: Sequence[int]) -> dict[str, float]:
    predictions = {
        item.id: Prediction(item.id, item.options[choice], choice) for item, choice in zip(items, choices, strict=True)
    }
    return {metric.name.split()[0]: metric.values[0] for metric in MMBENCH.score(items, predictions)}


def test_the_options_go_round_and_the_answer_with_them(miniature: Miniature) -> None:
    row = {**rows_of(miniature)[0], "A": "w", "B": "x", "C": "y", "D": "z", "answer": "B"}
    items = rewrite(miniature, [row])
    assert [item.reference["choices"] for item in items] == [list(order) for order in ("wxyz", "xyzw", "yzwx", "zwxy")]
    assert [item.reference["answer"] for item in items] == [1, 0, 3, 2]
    assert [item.id for item in items] == ["0", "1000000", "2000000", "3000000"]
    assert {item.unit for item in items} == {"0"}
    assert "Options: A. y\nB. z\nC. w\nD. x\nAnswer:" in items[2].text


def test_a_file_that_holds_its_rotations_is_taken_as_it_is(miniature: Miniature) -> None:
    row = {**rows_of(miniature)[0], "index": "7", "A": "w", "B": "x", "answer": "A"}
    turned = {**row, "index": "1000007", "A": "x", "B": "w", "answer": "B"}
    items = rewrite(miniature, [turned, row])
    assert [(item.id, item.unit, item.reference["answer"]) for item in items] == [("7", "7", 0), ("1000007", "7", 1)]


def test_a_question_counts_only_if_every_rotation_is_right(miniature: Miniature) -> None:
    row = {**rows_of(miniature)[0], "A": "w", "B": "x", "C": "y", "D": "z", "answer": "B"}
    items = rewrite(miniature, [row])
    assert choose(items, [1, 0, 3, 2]) == {"circular": 1.0, "vote": 1.0, "vanilla": 1.0}
    assert choose(items, [1, 0, 3, 3]) == {"circular": 0.0, "vote": 1.0, "vanilla": 1.0}
    assert choose(items, [0, 0, 3, 1]) == {"circular": 0.0, "vote": 0.5, "vanilla": 0.0}  # x, x against w, w
    assert choose(items, [0, 0, 0, 0]) == {"circular": 0.0, "vote": 0.25, "vanilla": 0.0}  # always A: w, x, y, z


def test_images_keep_their_bytes_and_are_written_once(miniature: Miniature) -> None:
    rows = rows_of(miniature)
    items = rewrite(miniature, [*rows, {**rows[1], "index": "50", "image": "0"}])  # "0": the image of row 0
    folder = miniature.images / "mmbench_dev_images"
    assert sorted(path.read_bytes() for path in folder.iterdir()) == sorted(
        base64.b64decode(row["image"]) for row in rows
    )
    assert items[-1].images == items[0].images
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert MMBENCH.read(miniature.data, miniature.images) == items
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": ""}, "options A, B … without a gap, found ['A', 'C']"),
        ({"answer": "D"}, "field 'answer': expected one of A, B, C, found 'D'"),
        ({"answer": ""}, "has no field 'answer'"),
        ({"index": "0"}, "has index 0, and so has"),
        ({"index": "-5"}, "field 'index': expected a whole number from 0 on, found -5"),
        ({"index": "x"}, "field 'index': expected a whole number, found 'x'"),
        ({"image": "/9j/4A*Q"}, "field 'image': expected an image file in base64, found '/9j/4A*Q'"),
        ({"image": base64.b64encode(b"no picture").decode()}, "field 'image': expected an image file in base64"),
    ],
)
def test_a_wrong_cell_is_named(miniature: Miniature, change: dict[str, str], message: str) -> None:
    rows = rows_of(miniature)
    with pytest.raises(QualityDataError) as error:
        rewrite(miniature, [rows[0], {**rows[1], **change}, rows[2]])
    assert f"{miniature.data}, line 3" in str(error.value) and message in str(error.value)


def test_a_cell_that_never_ends_is_named(miniature: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_MAX_CELL", 1 << 20)
    limit = csv.field_size_limit(1 << 20)
    try:
        with miniature.data.open("a", encoding="utf-8") as file:
            file.write('9\t"' + "no closing quote " * 100_000)
        with pytest.raises(QualityDataError, match="line 5 is not a row of a .tsv"):
            MMBENCH.read(miniature.data, miniature.images)
    finally:
        csv.field_size_limit(limit)


def test_a_row_with_too_few_cells_is_named(miniature: Miniature) -> None:
    with miniature.data.open("a", encoding="utf-8") as file:
        file.write("9\tonly\n")
    with pytest.raises(QualityDataError, match="line 5 has 2 cells, the header has 10 names"):
        MMBENCH.read(miniature.data, miniature.images)
