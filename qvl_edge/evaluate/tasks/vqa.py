"""Questions that are answered in a few words: VQAv2 to AI2D, each with its own rule.

The file is upstream's .jsonl, one question a line:

    {"image": "data/coco/val2014/COCO_val2014_000000262148.jpg", "question": "Where is he looking?", "question_id": 262148000, "answer": "down"}
    {"image": "data/coco/val2014/COCO_val2014_000000262148.jpg", "question": "What is he on top of?", "question_id": 262148002, "answer": "table"}

VQA accuracy needs the ten people's answers: `answers` in the line, or the data set's annotations file under its
published name beside the .jsonl, as upstream's scorer takes them ("annotations" of the tasks below). The official
files are read as well: the questions files of VQAv2, OK-VQA and GQA, TextVQA_0.5.1_val.json, VizWiz's val.json,
val_v1.0.json of DocVQA, infographicsVQA_val_v1.0_withQT.json, and ChartQA's test_human.json and test_augmented.json.
"""  # noqa: E501

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qvl_edge.evaluate.item import Item, Prediction
from qvl_edge.evaluate.scoring.anls import anls
from qvl_edge.evaluate.scoring.exact import exact_match, gqa_answer
from qvl_edge.evaluate.scoring.relaxed_accuracy import relaxed_accuracy
from qvl_edge.evaluate.scoring.vqa_accuracy import vqa_accuracy
from qvl_edge.evaluate.task import Metric, QualityDataError, Scorer, Task, by_item
from qvl_edge.evaluate.tasks.reading import Row, ids_of, read_json, read_rows, records_of

Rule = Callable[[str, Sequence[str]], float]  # answer, accepted answers -> 0 to 1
_ID = ("question_id", "questionId")
_IMAGE = ("image", "image_local_name", "imgname")


@dataclass(frozen=True)
class _Format:
    """What the files of a data set have of their own."""

    image_of: Callable[[Row], str] | None = None  # an image's name where the row has an id of it only
    annotations: tuple[str, ...] = ()  # published names of the file of answers, beside the questions
    voted: bool = False  # an answer is compared with those of several people: one `answer` is not enough


def read(file: Path, images: Path | None, form: _Format) -> list[Item]:
    """An item a question; its reference is the list of accepted answers."""
    rows = read_rows(file)
    answers_of = _answers_of(file, rows, form)
    items = []
    for row, identity in zip(rows, ids_of(rows, *_ID), strict=True):
        name = row.text(*_IMAGE) if row.has(*_IMAGE) or form.image_of is None else form.image_of(row)
        path = row.image(name, images or file.parent)
        answers, group = answers_of(row)
        items.append(Item(identity, (path, f"{row.text('question', 'query')} Answer:"), answers, group=group))
    return items


def _answers_of(file: Path, rows: Sequence[Row], form: _Format) -> Callable[[Row], tuple[list[str], str]]:
    """row -> its answers, and the type of answer where the file has one."""
    beside = next((path for name in form.annotations if (path := file.parent / name).is_file()), None)
    people: dict[str, Row] = {}
    if beside is not None and not all(row.has("answers") for row in rows):
        entries = records_of(beside, read_json(beside), "annotations", "data")
        people = {str(entry.get(*_ID)): entry for entry in entries}

    def find(row: Row) -> tuple[list[str], str]:
        if row.has("answers"):
            source = row
        elif beside is not None:
            identity = str(row.get(*_ID))
            if identity not in people:
                raise QualityDataError(f"{row.where}: {beside} has no answers for question_id {identity}")
            source = people[identity]
        elif form.voted:
            raise QualityDataError(
                f"{row.where} has no 'answers', the list of what several people said, and {file.parent} has no "
                f"{' or '.join(form.annotations)}; put that file beside {file.name}"
            )
        else:
            source = row
        names = ("answers",) if form.voted else ("answers", "answer", "label")
        answers, kind = source.texts(*names), source.get("answer_type", default="")
        if form.voted and len(answers) == 1:
            raise source.error(names, "the answers of several people", answers)
        return answers, kind if isinstance(kind, str) else ""

    return find


def _score(rules: Mapping[str, Rule]) -> Scorer:
    def score(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
        return [
            by_item(name, items, [rule(predictions[item.id].text, item.reference) for item in items])
            for name, rule in rules.items()
        ]

    return score


def _task(name: str, title: str, rules: Mapping[str, Rule], longest: int, form: _Format) -> Task:
    return Task(
        name,
        title,
        lambda file, images: read(file, images, form),
        _score(rules),
        source="Qwen-VL eval_mm/evaluate_vqa.py",
        generation={"do_sample": False, "min_new_tokens": 1, "max_new_tokens": longest},
    )


def _coco(row: Row) -> str:
    return f"COCO_val2014_{row.integer('image_id'):012d}.jpg"


def _jpg(row: Row) -> str:
    return f"{row.get('image_id', 'imageId')}.jpg"


_VQAV2 = _Format(_coco, ("v2_mscoco_val2014_annotations.json",), voted=True)
_OKVQA = _Format(_coco, ("mscoco_val2014_annotations.json",), voted=True)
_TEXTVQA = _Format(_jpg, ("textvqa_val_annotations.json",), voted=True)
_VIZWIZ = _Format(None, ("vizwiz_val_annotations.json",), voted=True)
_DOCVQA = _Format(None, ("val_v1.0.json", "val/val_v1.0.json"))
_INFOGRAPHICVQA = _Format(None, ("infographicsVQA_val_v1.0_withQT.json",))

_VOTED: dict[str, Rule] = {"VQA accuracy": vqa_accuracy}
_ALIKE: dict[str, Rule] = {"ANLS": anls}
_EXACT: dict[str, Rule] = {"accuracy": exact_match}
_GQA: dict[str, Rule] = {"accuracy": lambda text, answers: exact_match(gqa_answer(text), answers)}
_RELAXED: dict[str, Rule] = {
    "relaxed accuracy": relaxed_accuracy,
    "relaxed accuracy as in Qwen-VL's table": partial(relaxed_accuracy, swapped=True),
}

VQA = (
    _task("vqav2", "VQAv2 (val)", _VOTED, 10, _VQAV2),
    _task("okvqa", "OK-VQA (val)", _VOTED, 10, _OKVQA),
    _task("textvqa", "TextVQA (val)", _VOTED, 10, _TEXTVQA),
    _task("vizwiz", "VizWiz (val)", _VOTED, 10, _VIZWIZ),
    _task("gqa", "GQA (testdev balanced)", _GQA, 10, _Format(_jpg)),
    _task("ocrvqa", "OCR-VQA (test)", _EXACT, 100, _Format()),
    _task("docvqa", "DocVQA (val)", _ALIKE, 100, _DOCVQA),
    _task("infographicvqa", "InfographicVQA (val)", _ALIKE, 100, _INFOGRAPHICVQA),
    _task("chartqa_human", "ChartQA (test, human)", _RELAXED, 100, _Format()),
    _task("chartqa_augmented", "ChartQA (test, augmented)", _RELAXED, 100, _Format()),
    _task("ai2d", "AI2D (test)", _EXACT, 10, _Format()),
)
