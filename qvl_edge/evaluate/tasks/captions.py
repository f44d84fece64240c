"""Captions: nocaps and Flickr30k, scored by CIDEr.

The file is nocaps_val.json or flickr30k_karpathy_test.json, in COCO's format:

    {"images": [{"id": 0, "image": "data/nocaps/images/0013ea2087020901.jpg"}],
     "annotations": [{"id": 0, "image_id": 0, "caption": "A baby in a bathtub."}]}

The official nocaps_val_4500_captions.json names an image `file_name` and gives its `domain`, which is averaged apart;
those averages keep the word frequencies of the whole file, where nocaps' server takes those of the domain.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from qvl_edge.evaluate.item import Item, Prediction
from qvl_edge.evaluate.scoring.cider import cider
from qvl_edge.evaluate.task import Metric, QualityDataError, Task, by_item
from qvl_edge.evaluate.tasks.reading import ids_of, read_json, records_of

PROMPT = "Describe the image in English:"


def read(file: Path, images: Path | None) -> list[Item]:
    """An item an image; its reference is the list of its captions."""
    value = read_json(file)
    rows = records_of(file, value, "images")
    captions: dict[str, list[str]] = {}
    for row in records_of(file, value, "annotations"):
        captions.setdefault(str(row.get("image_id")), []).append(row.text("caption"))
    items = []
    for row, identity in zip(rows, ids_of(rows, "id"), strict=True):
        path = row.image(row.text("image", "file_name"), images or file.parent)
        if identity not in captions:
            raise QualityDataError(f"{row.where}: no entry of 'annotations' has image_id {identity}")
        items.append(Item(identity, (path, PROMPT), captions[identity], group=str(row.get("domain", default=""))))
    return items


def score(items: Sequence[Item], predictions: Mapping[str, Prediction]) -> list[Metric]:
    """CIDEr times 100. It depends on all captions of the file: a part of it is not comparable with the whole."""
    values = cider([predictions[item.id].text for item in items], [item.reference for item in items])
    return [by_item("CIDEr", items, values)]


def _task(name: str, title: str) -> Task:
    return Task(
        name,
        title,
        read,
        score,
        source="Qwen-VL eval_mm/evaluate_caption.py",
        generation={"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 30},
    )


CAPTIONS = (_task("nocaps", "nocaps (val)"), _task("flickr30k", "Flickr30k (Karpathy test)"))
