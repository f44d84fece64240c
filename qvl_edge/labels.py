"""Boxes as labels for training: COCO, YOLO and Labelme files; and how they agree with known ones."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from qvl_edge.text.boxes import Box, iou

NO_LABEL = "object"  # the category of a box without a label
MIN_IOU = 0.5


@dataclass(frozen=True)
class Labelled:
    """A picture file, its size as it is shown, and the boxes on it."""

    file: str
    width: int
    height: int
    boxes: Sequence[Box] = field(default=())


def clipped(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 in pixels, within the picture."""
    x1, y1, x2, y2 = box.pixels
    return max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)


def categories(pictures: Iterable[Labelled]) -> list[str]:
    """The labels of all boxes, sorted."""
    return sorted({box.label or NO_LABEL for picture in pictures for box in picture.boxes})


def to_coco(pictures: Sequence[Labelled]) -> dict[str, Any]:
    """A COCO detection file: ids from 1, boxes as x, y, width, height in pixels, a quad as its segmentation."""
    names = categories(pictures)
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for image_id, picture in enumerate(pictures, 1):
        size = {"width": picture.width, "height": picture.height}
        images.append({"id": image_id, "file_name": picture.file, **size})
        for box in picture.boxes:
            x1, y1, x2, y2 = clipped(box, picture.width, picture.height)
            outline = box.quad_pixels or ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": names.index(box.label or NO_LABEL) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "segmentation": [[value for point in outline for value in point]],
                    "iscrowd": 0,
                }
            )
    known = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    return {"info": {"description": "made with qvl_edge"}, "images": images, "annotations": annotations} | {
        "categories": known
    }


def to_yolo(picture: Labelled, names: Sequence[str]) -> str:
    """The lines of a YOLO file: class, centre and size in parts of the picture's sides. names: `categories` of all."""
    lines = []
    for box in picture.boxes:
        x1, y1, x2, y2 = clipped(box, picture.width, picture.height)
        sides = picture.width, picture.height
        centre = ((x1 + x2) / 2 / sides[0], (y1 + y2) / 2 / sides[1])
        size = ((x2 - x1) / sides[0], (y2 - y1) / sides[1])
        lines.append(" ".join([str(names.index(box.label or NO_LABEL)), *(f"{value:.6f}" for value in centre + size)]))
    return "".join(f"{line}\n" for line in lines)


def to_labelme(picture: Labelled) -> dict[str, Any]:
    """A Labelme file beside its picture: rectangles, and polygons for quads."""
    shapes = list[dict[str, Any]]()
    for box in picture.boxes:
        x1, y1, x2, y2 = clipped(box, picture.width, picture.height)
        points = [list(map(float, point)) for point in box.quad_pixels or ((x1, y1), (x2, y2))]
        kind = "polygon" if box.quad_pixels else "rectangle"
        shapes.append(
            {"label": box.label or NO_LABEL, "points": points, "group_id": None, "shape_type": kind, "flags": {}}
        )
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": picture.file,
        "imageData": None,
        "imageHeight": picture.height,
        "imageWidth": picture.width,
    }


class Agreement(NamedTuple):
    """Counts over all pictures: boxes that match a known one of their category, boxes found, boxes known."""

    right: int
    found: int
    known: int

    @property
    def precision(self) -> float:
        """Share of the boxes found that are right."""
        return self.right / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        """Share of the known boxes that were found."""
        return self.right / self.known if self.known else 0.0


def agreement(found: dict[str, Any], known: dict[str, Any]) -> Agreement:
    """Compare two COCO files by file name and category name: each known box is matched once, best overlap first, at an
    intersection over union of 0.5 or more. Known boxes of pictures that `found` has not are left out."""
    ours, theirs = _by_picture(found), _by_picture(known)
    files = {image["file_name"] for image in found["images"]}
    right = 0
    for key in ours.keys() & theirs.keys():
        pairs = sorted(
            ((iou(one, other), i, j) for i, one in enumerate(ours[key]) for j, other in enumerate(theirs[key])),
            reverse=True,
        )
        used: tuple[set[int], set[int]] = set(), set()
        for overlap, i, j in pairs:
            if overlap >= MIN_IOU and i not in used[0] and j not in used[1]:
                used[0].add(i)
                used[1].add(j)
                right += 1
    total = sum(len(boxes) for (file, _), boxes in theirs.items() if file in files)
    return Agreement(right, len(found["annotations"]), total)


def _by_picture(coco: dict[str, Any]) -> dict[tuple[str, str], list[Sequence[float]]]:
    """Boxes x1, y1, x2, y2 by (file name, category)."""
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    names = {category["id"]: category["name"] for category in coco["categories"]}
    boxes: dict[tuple[str, str], list[Sequence[float]]] = {}
    for one in coco["annotations"]:
        x, y, width, height = one["bbox"]
        key = files[one["image_id"]], names[one["category_id"]]
        boxes.setdefault(key, []).append((x, y, x + width, y + height))
    return boxes
