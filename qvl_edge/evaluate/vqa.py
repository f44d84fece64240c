"""Questions that are answered in a few words, VQAv2 to AI2D: VQA accuracy, ANLS, relaxed accuracy or exact match.

The file is upstream's .jsonl, one question a line (docs/quality.md). VQA accuracy needs the answers of ten people:
`answers` in the line, or the data set's annotations file under its published name beside the .jsonl, as upstream's
scorer takes them ("annotations" of the tasks below). The official files are read as well: the questions files of VQAv2,
OK-VQA and GQA, TextVQA_0.5.1_val.json, VizWiz's val.json, val_v1.0.json of DocVQA,
infographicsVQA_val_v1.0_withQT.json, and ChartQA's test_human.json and test_augmented.json.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qvl_edge.evaluate.records import Row, ids_of, read_json, read_rows, records_of
from qvl_edge.evaluate.task import Item, Metric, Prediction, QualityDataError, Task, by_item

Rule = Callable[[str, Sequence[str]], float]  # answer, accepted answers -> 0 to 1

NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's "
    "there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're "
    "why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
).split()
# a word with one apostrophe missing -> the word
CONTRACTIONS = {
    whole[:place] + whole[place + 1 :]: whole
    for whole in _CONTRACTED
    for place, letter in enumerate(whole)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # so in the official table


def without_punctuation(text: str) -> str:
    """Marks become spaces, or nothing where one stands beside a space or a comma between digits; full stops go."""
    joined = re.search(r"\d,\d", text) is not None
    out = text
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if joined or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)  # the official call passes re.UNICODE, which is 32, as the count


def normalize(text: str) -> str:
    """A model's answer in the form it is compared in: no marks, lower case, numbers to ten in digits, no articles."""
    text = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """How many people gave this answer, three being enough: each person is left out once, min(1, agreeing others / 3)
    is taken, and the mean over the people returned.

    As the official vqaEval.py (GT-Vision-Lab/VQA, copied in Qwen-VL's eval_mm/vqa_eval.py), quirks included: people's
    answers lose their punctuation unless all are the same, and are not normalized further, as the model's is. lmms-eval
    normalizes both alike, so its figures are slightly higher where people wrote articles or numbers in words.

    answers: people's answers, ten in VQAv2, OK-VQA, TextVQA and VizWiz.
    """
    _need(answers, "VQA accuracy needs one or more, and the data sets have ten")
    given = [without_punctuation(answer) for answer in answers] if len(set(answers)) > 1 else list(answers)
    agreeing = given.count(normalize(prediction))
    others = len(given) - agreeing
    return (agreeing * min(1.0, (agreeing - 1) / 3) + others * min(1.0, agreeing / 3)) / len(given)


ANLS_THRESHOLD = 0.5
TOLERANCE = 0.05  # of relaxed accuracy


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity (arXiv:1905.13648) to the closest reference, 0 below a half. Case and
    the width of white space do not count.

    As in the script of DocVQA and InfographicVQA that Qwen-VL's eval_mm/infographicsvqa_eval.py is. It differs from the
    package `anls` and from the paper in two ways: a similarity of exactly 0.5 counts, and the distance is divided by
    the length of the texts as given, white space included.
    """
    _need(references, "ANLS needs one or more")

    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    distances = []
    for reference in references:
        length = max(len(reference.upper()), len(prediction.upper()))
        distances.append(levenshtein(plain(reference), plain(prediction)) / length if length else 0.0)
    similarity = 1.0 - min(distances)
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def levenshtein(one: str, other: str) -> int:
    """The fewest characters to insert, delete or replace that turn one text into the other."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        above, row = row, [i]
        for j, wanted in enumerate(other, 1):
            row.append(min(above[j - 1] + (letter != wanted), above[j] + 1, row[-1] + 1))
    return row[-1]


def relaxed_accuracy(prediction: str, references: Sequence[str], *, swapped: bool = False) -> float:
    """ChartQA's (arXiv:2203.10244): 1.0 if a number is at most 5 % off a reference, or a text the same, else 0.0.

    As pix2struct's metrics.py: "12%" is 0.12, the error is relative to the reference, and case does not count. A
    reference of 0 and whatever float() cannot read are compared as text.
    swapped: the error is relative to the prediction instead. Qwen-VL's evaluate_vqa.py exchanges the two arguments, so
    its published figures are of this kind; they differ between 4.76 and 5.26 % off, and around 0.
    """
    _need(references, "relaxed accuracy needs one or more")
    answer = prediction.strip()
    return float(any(_close(answer, one) if swapped else _close(one, answer) for one in references))


def _close(target: str, given: str) -> bool:
    wanted, number = _number(target), _number(given)
    if number is None or not wanted:
        return target.lower() == given.lower()
    return abs(number - wanted) / abs(wanted) <= TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the answer is one of the references, case and surrounding white space aside, else 0.0.

    As Qwen-VL's eval_mm/evaluate_vqa.py has it for GQA, OCR-VQA and AI2D.
    """
    _need(references, "exact match needs one or more")
    answer = prediction.strip().lower()
    return float(any(answer == reference.strip().lower() for reference in references))


def gqa_answer(text: str) -> str:
    """The answer in a sentence, before it is compared for GQA: "It is on the left of it." -> "left".

    What comes before the first of . , ! is kept; then what is between a first and a second "is ", "are ", "a ", "an ",
    "the ", each in turn; then what comes before " of". Upstream looks for letters, not words, so "pizza box" is "box".
    """
    answer = text.strip().split(".")[0].split(",")[0].split("!")[0].lower()
    for word in ("is ", "are ", "a ", "an ", "the "):
        if word in answer:
            answer = answer.split(word)[1]
    return answer.split(" of")[0].strip()


def _need(references: Sequence[str], needed: str) -> None:
    if not references:
        raise QualityDataError(f"an item has no reference answer; {needed}")


_ID = ("question_id", "questionId")
_IMAGE = ("image", "image_local_name", "imgname")


@dataclass(frozen=True)
class _Format:
    """What is particular to a data set's files."""

    image_of: Callable[[Row], str] | None = None  # an image's file name where the row only has its id
    annotations: tuple[str, ...] = ()  # published names of the file of answers, beside the questions
    voted: bool = False  # an answer is compared with those of several people: one `answer` is not enough


def read(file: Path, images: Path | None, form: _Format) -> list[Item]:
    """An item for each question; its reference is the list of accepted answers."""
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
    """row -> its answers, and the answer type where the file has one."""
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


def _score(rules: Mapping[str, Rule], items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    return [
        by_item(name, items, [rule(predictions[item.id].text, item.reference) for item in items])
        for name, rule in rules.items()
    ]


def _task(name: str, title: str, rules: Mapping[str, Rule], longest: int, form: _Format) -> Task:
    return Task(
        name,
        title,
        partial(read, form=form),
        partial(_score, rules),
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
_ANLS: dict[str, Rule] = {"ANLS": anls}
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
    _task("docvqa", "DocVQA (val)", _ANLS, 100, _DOCVQA),
    _task("infographicvqa", "InfographicVQA (val)", _ANLS, 100, _INFOGRAPHICVQA),
    _task("chartqa_human", "ChartQA (test, human)", _RELAXED, 100, _Format()),
    _task("chartqa_augmented", "ChartQA (test, augmented)", _RELAXED, 100, _Format()),
    _task("ai2d", "AI2D (test)", _EXACT, 10, _Format()),
)
