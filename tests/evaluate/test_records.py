"""The files that tasks read: official forms beside upstream's; errors that say where, which field and what is there."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl_edge.evaluate import TASKS
from qvl_edge.evaluate.task import Prediction, QualityDataError
from qvl_edge.vision.image import load_image

from .miniature import Miniature, make, scenes

TEN = ["2"] * 9 + ["two"]


def save_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scenes()[0].image.resize((28, 14)).save(path)


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def change_line(path: Path, line: int, change: dict[str, Any]) -> None:
    """Change fields of a line, or drop those that become None."""
    lines = path.read_text(encoding="utf-8").splitlines()
    record = {**json.loads(lines[line - 1]), **change}
    lines[line - 1] = json.dumps({key: value for key, value in record.items() if value is not None})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


OFFICIAL = {
    "vqav2": {"questions": [{"image_id": 42, "question": "How many?", "question_id": 42000, "answers": TEN}]},
    "textvqa": {"data": [{"image_id": "0a1b", "question": "How many?", "question_id": 7, "answers": TEN}]},
    "vizwiz": [{"image": "v.jpg", "question": "How many?", "answers": [{"answer": one} for one in TEN]}],
    "gqa": {"201": {"imageId": "n16", "question": "How many?", "answer": "2"}},
    "docvqa": {"data": [{"questionId": 9, "image": "documents/d.png", "question": "How many?", "answers": ["2"]}]},
    "infographicvqa": {
        "data": [{"questionId": 9, "image_local_name": "1.jpeg", "question": "How many?", "answers": ["2"]}]
    },
    "chartqa_human": [{"imgname": "c.png", "query": "How many?", "label": "2"}],
}
NAMES = {
    "vqav2": "COCO_val2014_000000000042.jpg",
    "textvqa": "0a1b.jpg",
    "vizwiz": "v.jpg",
    "gqa": "n16.jpg",
    "docvqa": "documents/d.png",
    "infographicvqa": "1.jpeg",
    "chartqa_human": "c.png",
}
IDS = {"vqav2": "42000", "textvqa": "7", "vizwiz": "1", "gqa": "201", "docvqa": "9", "infographicvqa": "9"}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_data_sets_own_files_are_read_as_well(tmp_path: Path, name: str) -> None:
    save_picture(tmp_path / "images" / NAMES[name])
    [item] = TASKS[name].read(write(tmp_path / "official.json", OFFICIAL[name]), tmp_path / "images")
    assert item.content == (tmp_path / "images" / NAMES[name], "How many? Answer:")
    assert item.id == IDS.get(name, "1")
    assert item.reference == (TEN if name in ("vqav2", "textvqa", "vizwiz") else ["2"])


def test_without_images_names_start_from_the_files_folder(tmp_path: Path) -> None:
    miniature = make("gqa", tmp_path)
    assert TASKS["gqa"].read(miniature.data.rename(miniature.images / "moved.jsonl"), None)[0].images[0].is_file()


def test_answers_of_people_come_from_the_published_file_with_their_type(tmp_path: Path) -> None:
    miniature = make("vqav2", tmp_path)
    item = TASKS["vqav2"].read(miniature.data, miniature.images)[0]
    assert item.reference == ["1"] * 9 + ["many"]
    assert item.group == "number"


def test_nocaps_own_file_names_images_and_domains_its_way(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.jpg")
    images = [{"id": 5, "file_name": "a.jpg", "domain": "near-domain"}]
    captions = [{"id": 1, "image_id": 5, "caption": "One."}, {"id": 2, "image_id": 5, "caption": "Two."}]
    [item] = TASKS["nocaps"].read(write(tmp_path / "n.json", {"images": images, "annotations": captions}), None)
    assert (item.id, item.group, item.reference) == ("5", "near-domain", ["One.", "Two."])


def test_seed_bench_prompts_of_upstream_open_the_images_they_mark_and_no_other(tmp_path: Path) -> None:
    for name in ("v0_0.jpg", "v0_1.jpg"):
        save_picture(tmp_path / "frames" / name)
    prompt = "<img>frames/v0_0.jpg</img>\n<img>frames/v0_1.jpg</img>\nQuestion: What?\nOptions: A. x\nAnswer:"
    file = write(tmp_path / "video_input_4.jsonl", {"question_id": "v0", "prompt": prompt, "answer": "C"})
    [item] = TASKS["seed_bench"].read(file, None)
    first, second = (tmp_path / "frames" / f"v0_{number}.jpg" for number in (0, 1))
    assert item.content == (first, "\n", second, "\nQuestion: What?\nOptions: A. x\nAnswer:")
    assert item.reference == 2


def test_seed_bench_takes_the_questions_about_images_by_dimension(tmp_path: Path) -> None:
    miniature = make("seed_bench", tmp_path)
    items = TASKS["seed_bench"].read(miniature.data, miniature.images)
    assert [item.group for item in items] == ["1", "2", "3"]  # the miniature's fourth question is about a video


def test_grits_frame_is_that_of_the_boxes_the_picture_as_it_is_shown(tmp_path: Path) -> None:
    turned = Image.new("RGB", (60, 40))
    turned.getexif()[0x112] = 6
    turned.save(tmp_path / "a.jpg", exif=turned.getexif())
    entry = {"input": {"image_path": "a.jpg", "task_query": "tv"}, "gt": {"bboxes": [[0, 0, 40, 30]]}}
    [item] = TASKS["grit"].read(write(tmp_path / "samples.json", {"refexp": [entry]}), None)
    assert item.reference["size"] == [40, 60] == list(load_image(tmp_path / "a.jpg").size)
    said = {item.id: Prediction(item.id, "(0,0),(999,499.5)")}
    assert TASKS["grit"].score([item], said)[0].values == [1.0]


def test_grits_examples_file_is_read_with_the_size_of_the_image(tmp_path: Path) -> None:
    save_picture(tmp_path / "r.png")
    entry = {"gt": {"bboxes": [[1, 2, 9, 8]], "words": None}, "input": {"image_path": "r.png", "task_query": "a tv"}}
    [item] = TASKS["grit"].read(write(tmp_path / "samples.json", {"refexp": [entry], "vqa": []}), None)
    assert item.reference == {"box": [1, 2, 9, 8], "size": [28, 14]}


def test_ids_that_come_again_are_told_apart(tmp_path: Path) -> None:
    miniature = make("ai2d", tmp_path)
    for line in (1, 2, 3):
        change_line(miniature.data, line, {"question_id": "2.png"})
    items = TASKS["ai2d"].read(miniature.data, miniature.images)
    assert [item.id for item in items] == ["2.png", "2.png#2", "2.png#3"]


def fails(name: str, miniature: Miniature, *parts: str) -> None:
    with pytest.raises(QualityDataError) as error:
        TASKS[name].read(miniature.data, miniature.images)
    for part in (miniature.data.name, *parts):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("gqa", {"question": None}, ["line 2", "has no field 'question' or 'query'", "image, question_id, answer"]),
        ("gqa", {"question": " "}, ["line 2, field 'question'", "expected text", "found ' '"]),
        ("gqa", {"answer": 5}, ["line 2, field 'answer'", "text or a list of texts", "found 5"]),
        ("vqav2", {"answers": ["2"]}, ["line 2, field 'answers'", "answers of several people", "found ['2']"]),
        ("refcoco", {"bbox": [1, 2, 3]}, ["line 2, field 'bbox'", "[x1, y1, x2, y2] in pixels", "found [1, 2, 3]"]),
        ("refcoco", {"bbox": [5, 2, 5, 9]}, ["line 2, field 'bbox'", "x1 < x2"]),
        ("refcoco", {"bbox": [math.nan, 0, 10, 10]}, ["line 2, field 'bbox'", "found [nan, 0, 10, 10]"]),
        ("refcoco", {"bbox": [0, 0, 10, math.inf]}, ["line 2, field 'bbox'", "found [0, 0, 10, inf]"]),
        ("refcoco", {"bbox": [0, 0, 10, 10**400]}, ["line 2, field 'bbox'", "found [0, 0, 10, 1000"]),
        ("refcoco", {"width": 0}, ["line 2, field 'width'", "a number of pixels above 0", "found 0"]),
        ("refcoco", {"height": -5}, ["line 2, field 'height'", "a number of pixels above 0", "found -5"]),
        ("refcoco", {"image": "x" * 5000}, ["line 2: no image is named 'xxx", "…: File name too long"]),
        ("refcoco", {"width": "wide"}, ["line 2, field 'width'", "a whole number", "'wide'"]),
        ("scienceqa", {"answer": 3}, ["line 2, field 'answer'", "below 3", "found 3"]),
        ("scienceqa", {"choices": ["one"]}, ["line 2, field 'choices'", "2 to 26 options"]),
        ("scienceqa", {"hint": None}, ["line 2 has no field 'hint'"]),
    ],
)
def test_a_wrong_field_is_named_with_its_line_and_what_it_holds(
    tmp_path: Path, name: str, change: dict[str, Any], parts: list[str]
) -> None:
    miniature = make(name, tmp_path)
    change_line(miniature.data, 2, change)
    fails(name, miniature, *parts)


def test_a_missing_image_names_the_path_tried_and_the_flag(tmp_path: Path) -> None:
    miniature = make("gqa", tmp_path)
    change_line(miniature.data, 3, {"image": "data/lost.jpg"})
    fails("gqa", miniature, "line 3", "'data/lost.jpg'", str(miniature.images / "data/lost.jpg"), "--images DIR")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"image": ', "line 2 is not valid JSON"),
        ("[1, 2]", "line 2 holds a list, expected an object"),
        ("[" * 100_000, "line 2 is not valid JSON"),
        ('{"image": ' + "9" * 5000 + "}", "line 2 is not valid JSON"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path: Path, text: str, said: str) -> None:
    miniature = make("gqa", tmp_path)
    miniature.data.write_text("\n" + text + "\n", encoding="utf-8")
    fails("gqa", miniature, said)


def test_an_empty_and_a_missing_file_are_named(tmp_path: Path) -> None:
    miniature = make("gqa", tmp_path)
    miniature.data.write_text("\n", encoding="utf-8")
    fails("gqa", miniature, "has no records")
    miniature.data.unlink()
    fails("gqa", miniature, f"{miniature.data} is missing")


@pytest.mark.parametrize("name", ["nocaps", "gqa", "mmbench", "grit"])
def test_a_folder_where_a_file_is_expected_is_named(tmp_path: Path, name: str) -> None:
    miniature = make(name, tmp_path)
    miniature.data.unlink()
    miniature.data.mkdir()
    fails(name, miniature, "is a folder; --data names the task's file")


def test_json_too_deep_to_read_is_named(tmp_path: Path) -> None:
    miniature = make("grit", tmp_path)
    miniature.data.write_text("[" * 100_000, encoding="utf-8")
    fails("grit", miniature, "is not valid JSON")


def test_a_damaged_image_whose_size_is_needed_is_named(tmp_path: Path) -> None:
    miniature = make("grit", tmp_path)
    (miniature.images / "coco" / "1.jpg").write_bytes(b"no picture")
    fails("grit", miniature, "record 2", "coco/1.jpg is not an image that can be read")


def test_vqa_accuracy_does_not_take_one_answer_for_ten_peoples(tmp_path: Path) -> None:
    miniature = make("vqav2", tmp_path)
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    people = json.loads(annotations.read_text())
    del people["annotations"][1]
    write(annotations, people)
    fails("vqav2", miniature, "line 2", str(annotations), "no answers for question_id 101")
    annotations.unlink()
    fails("vqav2", miniature, "line 1 has no 'answers'", "v2_mscoco_val2014_annotations.json")


def test_captions_that_are_missing_are_named(tmp_path: Path) -> None:
    miniature = make("nocaps", tmp_path)
    value = json.loads(miniature.data.read_text())
    write(miniature.data, {**value, "annotations": value["annotations"][:2]})
    fails("nocaps", miniature, "record 2", "has image_id 1")
    write(miniature.data, {"images": value["images"]})
    fails("nocaps", miniature, "under 'annotations'")


def test_grit_without_true_boxes_says_that_none_are_published(tmp_path: Path) -> None:
    miniature = make("grit", tmp_path)
    records = json.loads(miniature.data.read_text())
    write(miniature.data, [{**one, "bboxes": [[1, 1, 2, 2]]} if one is records[0] else one for one in records])
    del records[2]["bboxes"]
    write(miniature.data, records)
    fails("grit", miniature, "record 3 has no 'bboxes'", "GRIT publishes none")
