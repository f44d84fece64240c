"""Tiny data sets in each task's published format, of pictures that the package draws.

`make("vqav2", folder)` writes three questions or so with their images, and says where `--data` and `--images` point to.
The questions are those that the small model knows; their texts, ids and answers follow from SCENES alone.
"""

import base64
import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl_edge.demo.scenes import SIZE, UNSEEN, Scene, make_scene

SCENES = tuple(UNSEEN + number for number in (2001, 2003, 2007))  # one, two and three shapes, and a number on each
COUNT = len(SCENES)


@dataclass(frozen=True)
class Miniature:
    """What --data and --images are."""

    data: Path
    images: Path


def scenes() -> list[Scene]:
    """The pictures: the data sets' image number i is SCENES[i]."""
    return [make_scene(seed) for seed in SCENES]


def make(task: str, folder: Path) -> Miniature:
    """The data set of a task below `folder`; KeyError for a task that has none."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    return Miniature(MAKERS[task](folder, images), images)


def _save(images: Path, name: str, scene: Scene) -> str:
    path = images / name
    path.parent.mkdir(parents=True, exist_ok=True)
    scene.image.save(path, **({"quality": 92} if path.suffix == ".jpg" else {"compress_level": 1}))
    return name


def _lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def _json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def _names(scene: Scene) -> list[str]:
    return [shape.name("en") for shape in scene.shapes]


def _captions(file: str) -> Callable[[Path, Path], Path]:
    def write(folder: Path, images: Path) -> Path:
        pictured, annotations = [], []
        for number, scene in enumerate(scenes()):
            pictured.append({"id": number, "image": _save(images, f"data/{number}.jpg", scene)})
            seen = " and a ".join(_names(scene))
            for caption in (f"A {seen} on a plain ground.", f"There is a {seen} in the picture."):
                annotations.append({"id": len(annotations), "image_id": number, "caption": caption})
        return _json(folder / file, {"images": pictured, "annotations": annotations})

    return write


def _question(number: int, scene: Scene) -> dict[str, Any]:
    return {"question": "How many shapes are there?", "question_id": 100 + number, "answer": str(len(scene.shapes))}


def _vqa(file: str, annotations: str | None = None) -> Callable[[Path, Path], Path]:
    """Upstream's .jsonl; with `annotations` also the ten people's answers, of whom the last one is wrong."""

    def write(folder: Path, images: Path) -> Path:
        questions, people = [], []
        for number, scene in enumerate(scenes()):
            question = _question(number, scene)
            questions.append({"image": _save(images, f"data/{number}.jpg", scene), **question})
            said = [question["answer"]] * 9 + ["many"]
            answers = [{"answer": answer, "answer_id": place} for place, answer in enumerate(said, 1)]
            kept = {"question_id": question["question_id"], "image_id": number, "answer_type": "number"}
            people.append({**kept, "question_type": "how many", "answers": answers})
        if annotations:
            _json(folder / annotations, {"annotations": people})
        return _lines(folder / file, questions)

    return write


def _scienceqa(folder: Path, images: Path) -> Path:
    records = []
    for number, scene in enumerate(scenes()):
        choices = [scene.shapes[0].colour, "brown", "grey"][: 2 + number % 2]
        record = {"image": _save(images, f"test/{number}/image.png", scene), "hint": "" if number else "Look closely."}
        question = f"What colour is the {scene.shapes[0].kind}?"
        records.append({**record, "question": question, "choices": choices[::-1], "answer": len(choices) - 1})
    return _lines(folder / "scienceqa_test_img.jsonl", records)


def _seed_bench(folder: Path, images: Path) -> Path:
    questions = []
    for number, scene in enumerate(scenes()):
        choices = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), "1234", strict=True))
        entry = {"question_id": str(101 + number), "question_type_id": 1 + number, "data_type": "image"}
        shown = {"data_id": _save(images, f"{number}.jpg", scene), "question": "How many shapes are there?"}
        questions.append({**entry, **shown, **choices, "answer": "ABCD"[len(scene.shapes) - 1]})
    video = {"question_id": "v0", "question_type_id": 10, "data_type": "video", "data_id": "1.webm"}
    return _json(folder / "SEED-Bench.json", {"questions": [*questions, {**questions[0], **video}]})


def _base64(scene: Scene) -> str:
    buffer = io.BytesIO()
    scene.image.save(buffer, "JPEG", quality=92)
    return base64.b64encode(buffer.getvalue()).decode()


def _tsv(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    return path


def _mmbench(folder: Path, images: Path) -> Path:
    records = []
    for number, scene in enumerate(scenes()):
        options = {"A": "brown", "B": scene.shapes[0].colour, "C": "grey" if number else "", "D": ""}
        entry = {"index": number, "question": f"What colour is the {scene.shapes[0].kind}?", "hint": "", **options}
        category = ("attribute", "logic")[number % 2]
        records.append({**entry, "answer": "B", "category": category, "image": _base64(scene)})
    return _tsv(folder / "mmbench_dev.tsv", records)


def _refcoco(file: str) -> Callable[[Path, Path], Path]:
    def write(folder: Path, images: Path) -> Path:
        records = []
        for number, scene in enumerate(scenes()):
            shape = scene.shapes[0]
            box = [edge * SIZE / 999 for edge in shape.box]
            record = {"image": _save(images, f"data/{number}.jpg", scene), "sent": shape.name("en"), "bbox": box}
            records.append({**record, "width": SIZE, "height": SIZE})
        return _lines(folder / file, records)

    return write


def _grit(folder: Path, images: Path) -> Path:
    records = []
    for number, scene in enumerate(scenes()):
        box = [[round(edge * SIZE / 999) for edge in scene.shapes[0].box]]
        record = {"example_id": f"refexp_{number}", "image_id": _save(images, f"coco/{number}.jpg", scene)}
        task = {"task_name": "refexp", "task_query": scene.shapes[0].name("en"), "task_bbox": None}
        records.append({**record, **task, "output_options": None, "bboxes": box})
    return _json(folder / "refexp.json", records)


def _mme(folder: Path, images: Path) -> Path:
    """MME_Benchmark_release: `existence` with questions beside the images, `landmark` with both apart."""
    for subtask, pictured, asked in (("existence", "", ""), ("landmark", "images", "questions_answers_YN")):
        for number, scene in enumerate(scenes()):
            _save(images / subtask / pictured, f"{number}.jpg", scene)
            there, missing = scene.shapes[0].kind, "star"
            lines = [f"Is there a {what} in this image? Please answer yes or no." for what in (there, missing)]
            file = images / subtask / asked / f"{number}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{lines[0]}\tYes\n{lines[1]}\tNo\n", encoding="utf-8")
    return images


def _touchstone(folder: Path, images: Path) -> Path:
    records = []
    for number, scene in enumerate(scenes()):
        seen = " and a ".join(_names(scene))
        entry = {"index": number, "question": "What is in the picture?", "human_annotation": f"A {seen}."}
        answer = {"gpt4_ha_answer": f"A {seen} can be seen.", "category": "Visual Recognition", "task_name": "object"}
        records.append({**entry, **answer, "image": _base64(scene)})
    return _tsv(folder / "touchstone_20230831.tsv", records)


MAKERS: dict[str, Callable[[Path, Path], Path]] = {
    "nocaps": _captions("nocaps_val.json"),
    "flickr30k": _captions("flickr30k_karpathy_test.json"),
    "vqav2": _vqa("vqav2_val.jsonl", "v2_mscoco_val2014_annotations.json"),
    "okvqa": _vqa("okvqa_val.jsonl", "mscoco_val2014_annotations.json"),
    "textvqa": _vqa("textvqa_val.jsonl", "textvqa_val_annotations.json"),
    "vizwiz": _vqa("vizwiz_val.jsonl", "vizwiz_val_annotations.json"),
    "gqa": _vqa("testdev_balanced.jsonl"),
    "ocrvqa": _vqa("ocrvqa_test.jsonl"),
    "docvqa": _vqa("val.jsonl"),
    "infographicvqa": _vqa("val.jsonl"),
    "chartqa_human": _vqa("test_human.jsonl"),
    "chartqa_augmented": _vqa("test_augmented.jsonl"),
    "ai2d": _vqa("test.jsonl"),
    "scienceqa": _scienceqa,
    "seed_bench": _seed_bench,
    "mmbench": _mmbench,
    "refcoco": _refcoco("refcoco_val.jsonl"),
    "refcoco+": _refcoco("refcoco+_val.jsonl"),
    "refcocog": _refcoco("refcocog_val.jsonl"),
    "grit": _grit,
    "mme": _mme,
    "touchstone": _touchstone,
}
