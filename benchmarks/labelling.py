"""Label scenes whose boxes are known, and print precision and recall: python -m benchmarks.labelling --scenes 200

The scenes are drawn with `qvl_edge.demo.scenes`, from seeds that nothing is trained on; OUT gets the pictures, the
known boxes (truth.json) and the labels that `qvl-edge label` writes (labels.json), both as COCO files.
"""

import argparse
from pathlib import Path

from qvl_edge.__main__ import main as qvl_edge
from qvl_edge.demo import SMALL_MODEL
from qvl_edge.demo.scenes import CELL, UNSEEN, Shape, make_scene
from qvl_edge.files import write_json
from qvl_edge.labels import Labelled, to_coco
from qvl_edge.text.boxes import Box


def main(arguments: list[str] | None = None) -> int:
    """Draw, label, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SMALL_MODEL), metavar="BUNDLE", help="default: the small model")
    parser.add_argument("--scenes", type=int, default=200, metavar="N", help="pictures (default: 200)")
    parser.add_argument("--out", type=Path, default=Path("labelling"), metavar="OUT", help="default: labelling")
    args = parser.parse_args(arguments)
    write_scenes(args.out / "scenes", args.out / "truth.json", args.scenes)
    question, truth = "Describe the picture with boxes.", ["--truth", str(args.out / "truth.json")]
    output = ["--output", str(args.out / "labels.json")]
    return qvl_edge(["label", args.model, str(args.out / "scenes"), question, *output, *truth])


def write_scenes(folder: Path, truth: Path, count: int) -> None:
    """`count` pictures, and their boxes as a COCO file."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for index in range(count):
        scene = make_scene(UNSEEN + index)
        name = f"{index:06}.png"
        scene.image.save(folder / name)
        pictures.append(Labelled(name, *scene.image.size, [known_box(shape) for shape in scene.shapes]))
    write_json(truth, to_coco(pictures))


def known_box(shape: Shape) -> Box:
    """Where the shape was drawn, in pixels."""
    x1, y1, x2, y2 = (cell * CELL for cell in shape.cells)
    return Box(shape.name("en"), shape.box, (x1, y1, x2, y2), 0)


if __name__ == "__main__":
    raise SystemExit(main())
