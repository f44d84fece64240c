"""The examples of file formats in docs/quality.md are read by the tasks that they are for."""

import re
from pathlib import Path

import pytest
from PIL import Image

from qvl_edge.evaluate import TASKS

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "quality.md").read_text(encoding="utf-8")
BESIDE = {"textvqa_val.jsonl": "textvqa_val_annotations.json"}
READERS = {
    "nocaps_val.json": ("nocaps", "flickr30k"),
    "textvqa_val.jsonl": ("textvqa",),
    "scienceqa_test_img.jsonl": ("scienceqa",),
    "SEED-Bench.json": ("seed_bench",),
    "refcoco_val.jsonl": ("refcoco", "refcoco+", "refcocog"),
    "refexp.json": ("grit",),
}


def examples() -> dict[str, str]:
    """File name -> the block that follows its mention."""
    found = re.findall(r"^[^\n]*?`([\w.-]+\.jsonl?)`[^\n]*:\n\n```jsonl?\n(.*?)^```$", PAGE, re.S | re.M)
    return dict(found)


def test_every_block_of_data_is_an_example_that_is_tested() -> None:
    assert examples().keys() == {*READERS, *BESIDE.values()}
    assert len(re.findall(r"^```jsonl?$", PAGE, re.M)) == len(examples())


@pytest.mark.parametrize("name", READERS)
def test_the_example_is_read(name: str, tmp_path: Path) -> None:
    for file in (name, BESIDE.get(name, name)):
        (tmp_path / file).write_text(examples()[file], encoding="utf-8")
    for image in re.findall(r'"([\w./-]+\.(?:jpg|png))"', examples()[name]):
        path = tmp_path / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    for task in READERS[name]:
        items = TASKS[task].read(tmp_path / name, None)
        assert len(items) == len(re.findall(r'"(?:image|image_id|data_id)": "', examples()[name]))
        assert all(item.images and item.reference is not None for item in items)


def test_the_table_names_every_task() -> None:
    table = PAGE[PAGE.index("## Tasks") : PAGE.index("## Formats")]
    named = {name for row in re.findall(r"^\| (`.+?) \|", table, re.M) for name in re.findall(r"`([\w+]+)`", row)}
    assert named == TASKS.keys() - {"synthetic", "perplexity"}


@pytest.mark.parametrize("row", re.findall(r"^\| (`.+)$", PAGE[PAGE.index("## Tasks") :], re.M))
def test_the_table_has_the_decoding_of_its_tasks(row: str) -> None:
    names, _, _, decoding, _ = (cell.strip() for cell in row.split("|")[:5])
    for name in re.findall(r"`([\w+]+)`", names):
        generation = TASKS[name].generation
        if decoding.startswith("greedy"):
            low, high = generation.get("min_new_tokens"), generation["max_new_tokens"]
            assert decoding == (f"greedy, {low} to {high}" if low else f"greedy, up to {high}") + (
                " tokens" if "tokens" in decoding else ""
            )
            assert generation["do_sample"] is False
        else:
            assert "likelihood" in decoding
