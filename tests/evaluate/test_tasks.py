"""Every task: its published prompt and decoding, what its reader makes of a data set, the best and the worst score."""

from collections.abc import Mapping, Sequence

import pytest

from qvl_edge.evaluate import TASKS
from qvl_edge.evaluate.task import Item, Prediction, Task

from .miniature import COUNT, MAKERS, Miniature, make, scenes

PUBLISHED = [name for name in TASKS if name in MAKERS]
SCORED = [name for name in PUBLISHED if name != "touchstone"]  # a judge scores that one
CAPTION = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 30}
SHORT = {"do_sample": False, "min_new_tokens": 1, "max_new_tokens": 10}
LONG = {"do_sample": False, "min_new_tokens": 1, "max_new_tokens": 100}
BOX = {"do_sample": False, "min_new_tokens": 10, "max_new_tokens": 28}
CHAT = {"do_sample": False, "max_new_tokens": 512}

# the prompt of the first item of each miniature, and its options, as Qwen-VL's eval_mm would write them
COUNTING = "<img>0.jpg</img>How many shapes are there? Answer:"
SEED = (
    "<img>0.jpg</img>\nQuestion: How many shapes are there?\nOptions: A. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
    (" A", " B", " C", " D"),
)
SCIENCE = "Context: Look closely.\nQuestion: What colour is the circle?\nOptions: A. brown\nB. red\nAnswer:"
MM = "Context: N/A\nQuestion: What colour is the circle?\nOptions: A. brown\nB. red\nAnswer:"
REFER = "<img>0.jpg</img><ref>red circle</ref><box>"
PROMPTS: dict[str, tuple[str, tuple[str, ...], dict]] = {
    **{name: ("<img>0.jpg</img>Describe the image in English:", (), CAPTION) for name in ("nocaps", "flickr30k")},
    **{name: (COUNTING, (), SHORT) for name in ("vqav2", "okvqa", "textvqa", "vizwiz", "gqa", "ai2d")},
    **{name: (COUNTING, (), LONG) for name in ("ocrvqa", "docvqa", "infographicvqa")},
    **{name: (COUNTING, (), LONG) for name in ("chartqa_human", "chartqa_augmented")},
    "scienceqa": ("<img>image.png</img>" + SCIENCE, (" A", " B"), {}),
    "seed_bench": (*SEED, {}),
    "mmbench": ("<img>IMAGE</img>" + MM, (" A", " B"), {}),
    **{name: (REFER, (), BOX) for name in ("refcoco", "refcoco+", "refcocog", "grit")},
    "mme": ("<img>0.jpg</img>\nIs there a circle in this image? Please answer yes or no.", (), CHAT),
    "touchstone": ("Picture 1:<img>IMAGE</img>\nWhat is in the picture?", (), CHAT),
}


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory):
    """task name -> (its miniature, the items read from it), each made once."""
    made: dict[str, tuple[Miniature, list[Item]]] = {}

    def items_of(name: str) -> tuple[Miniature, list[Item]]:
        if name not in made:
            data = make(name, tmp_path_factory.mktemp("data"))
            made[name] = (data, TASKS[name].read(data.data, data.images))
        return made[name]

    return items_of


def predict(task: Task, items: Sequence[Item], *, right: bool) -> Mapping[str, Prediction]:
    """What a perfect model, or one that is always wrong, would have said."""
    drawn = {f"{number}.jpg": scene for number, scene in enumerate(scenes())}

    def answer(item: Item) -> Prediction:
        if item.options:
            true = item.reference["answer"] if task.name == "mmbench" else item.reference
            choice = true if right else (true + 1) % len(item.options)
            return Prediction(item.id, item.options[choice], choice)
        if not right:
            return Prediction(item.id, "zebra")
        if task.generation == BOX:
            box = drawn[item.images[0].name].shapes[0].box
            return Prediction(item.id, "({},{}),({},{})</box>".format(*box))
        return Prediction(item.id, item.reference if isinstance(item.reference, str) else item.reference[0])

    return {item.id: answer(item) for item in items}


def test_every_task_has_a_miniature() -> None:
    assert set(PROMPTS) == set(MAKERS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_prompt_and_the_decoding_are_the_published_ones(read, name: str) -> None:
    _, items = read(name)
    text, options, generation = PROMPTS[name]
    assert items[0].text.replace(items[0].images[0].name, "IMAGE") == text.replace(items[0].images[0].name, "IMAGE")
    assert items[0].options == options
    assert dict(TASKS[name].generation) == generation
    assert TASKS[name].chat_format == ("chatml" if name in ("mme", "touchstone") else "raw")


@pytest.mark.parametrize("name", PUBLISHED)
def test_items_have_ids_of_their_own_and_images_that_are_there(read, name: str) -> None:
    miniature, items = read(name)
    repeated = {"mmbench": 2 + 3 + 3, "mme": 2 * 2 * COUNT}  # rotations of the options; pairs in two subtasks
    assert len(items) == len({item.id for item in items}) == repeated.get(name, COUNT)
    for item in items:
        assert [path.is_file() and miniature.images in path.parents for path in item.images] == [True]
        texts = [isinstance(part, str) for part in item.content]
        assert not any(one and two for one, two in zip(texts, texts[1:], strict=False))  # what Content asks for


@pytest.mark.parametrize("name", SCORED)
def test_perfect_answers_score_best_and_wrong_ones_zero(read, name: str) -> None:
    _, items = read(name)
    task = TASKS[name]
    best = task.score(items, predict(task, items, right=True))
    worst = task.score(items, predict(task, items, right=False))
    assert [metric.name for metric in best] == [metric.name for metric in worst]
    for metric in best:
        if metric.name == "IoU":
            assert min(metric.values) > 0.98  # GRIT's boxes are whole pixels, of shapes at least 84 wide
        elif metric.name == "CIDEr":
            assert min(metric.values) > 1  # the second caption has other words, so 10 is out of reach
        else:
            assert set(metric.values) == {1.0}
    for metric in worst:
        assert set(metric.values) == {0.0}, metric.name
    for metric in best:
        assert len(metric.values) == len(metric.units) == len(metric.items) == len(set(metric.units))
        assert sorted(one for unit in metric.items for one in unit) == sorted(item.id for item in items)
        assert len(metric.groups) in (0, len(metric.values))


def test_the_tasks_say_where_they_come_from() -> None:
    for name in PUBLISHED:
        assert TASKS[name].name == name and TASKS[name].title and TASKS[name].source
