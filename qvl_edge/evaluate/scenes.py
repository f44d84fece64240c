"""A data set of synthetic scenes, for --task synthetic: python -m qvl_edge.evaluate.scenes FOLDER [--scenes 1000]

PNG files and scenes.jsonl, one question a line:

    {"question_id": "0-find", "images": ["0.png"], "kind": "find", "language": "en", "question": "Find the red circle.",
     "answer": "<ref>red circle</ref><box>(125,62),(437,375)</box>", "box": [125, 62, 437, 375]}
    {"question_id": "0-count", "images": ["0.png"], "kind": "count", "language": "zh", "question": "有几个图形？",
     "answer": "3个", "box": null}

ALWAYS is asked about every scene that allows it, the other kinds about every third; the two languages take turns.
The scenes are neither trained on nor calibrated with: their seeds start at TEST_SCENES.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from qvl_edge.demo.scenes import KINDS, UNSEEN, Scene, ask, ask_which, make_scene
from qvl_edge.files import replacing

TEST_SCENES = UNSEEN + 10**6  # first seed; calibration takes scenes from UNSEEN on
ALWAYS = ("find", "count", "read")
FILE = "scenes.jsonl"


def write_scenes(folder: Path, count: int) -> Path:
    """Write the data set of `count` scenes; the path of its scenes.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        rng = np.random.default_rng(TEST_SCENES + index)
        scene = make_scene(TEST_SCENES + index)
        _save(scene, folder / f"{index}.png")
        for number, kind in enumerate(KINDS):
            if index % 3 and kind not in ALWAYS:
                continue
            language = ("en", "zh")[(index + number) % 2]
            names = [f"{index}.png"]
            if kind == "which":
                other = make_scene(TEST_SCENES + count + index)
                _save(other, folder / f"{index}-other.png")
                names.append(f"{index}-other.png")
                question = ask_which((scene, other), language, rng)
            else:
                question = ask(scene, kind, language, rng)
            if question is not None:
                box = question.target.box if kind == "find" and question.target is not None else None
                lines.append(
                    {
                        "question_id": f"{index}-{kind}",
                        "images": names,
                        "kind": kind,
                        "language": language,
                        "question": question.text,
                        "answer": question.answer,
                        "box": box,
                    }
                )
    path = folder / FILE
    with replacing(path) as partial:  # the last file: where it is, all pictures are
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def _save(scene: Scene, path: Path) -> None:
    scene.image.save(path, compress_level=1)  # the noise does not get smaller, whatever the level


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m qvl_edge.evaluate.scenes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--scenes", type=int, default=1000)
    args = parser.parse_args(arguments)
    print(write_scenes(args.folder, args.scenes))


if __name__ == "__main__":
    main()
