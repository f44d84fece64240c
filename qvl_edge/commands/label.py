"""Label the pictures of a folder with boxes: qvl-edge label BUNDLE FOLDER "find the cars" --format coco

Each picture of FOLDER and of the folders in it is asked every question. Answers are kept beside the output as they come
(OUTPUT.answers-1.jsonl, …): interrupted, the same command continues. --truth compares with known boxes in a COCO file.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_edge.commands import loading
from qvl_edge.options import LoadOptions

if TYPE_CHECKING:
    from qvl_edge.labels import Labelled
    from qvl_edge.runtime import Runtime

EXAMPLES = """examples:
  qvl-edge label BUNDLE photos "Find the cars." "Find the traffic lights." --format coco
  qvl-edge label BUNDLE photos "框出所有行人" --format yolo --output labels"""
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge label`."""
    loading.add_path(parser)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="pictures to label")
    parser.add_argument("questions", nargs="+", metavar="QUESTION", help='what to find, as in "Find the cars."')
    parser.add_argument("--format", choices=("coco", "yolo", "labelme"), default="coco", help="default: coco")
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="a file for coco (default: labels.json), else a folder (labels)"
    )
    parser.add_argument("--truth", type=Path, metavar="COCO.json", help="known boxes, to print precision and recall")
    parser.add_argument("--slots", type=int, default=4, metavar="N", help="pictures answered at once (default: 4)")
    loading.add_options(parser)


def execute(args: argparse.Namespace) -> int:
    """Ask, write the labels; 1 if a picture could not be read."""
    from qvl_edge.errors import ConfigError
    from qvl_edge.files import read_json
    from qvl_edge.labels import agreement, to_coco

    options = {**LoadOptions.given(args), "slots": args.slots}
    LoadOptions.of(options)
    generation = {"do_sample": False, **loading.generation(args)}
    output: Path = args.output or Path("labels.json" if args.format == "coco" else "labels")
    truth = read_json(args.truth) if args.truth else None
    if truth is not None and not {"images", "annotations", "categories"} <= truth.keys():
        raise ConfigError(f"{args.truth} is no COCO file: it has no images, annotations and categories")
    if not args.folder.is_dir():
        raise ConfigError(f"{args.folder} is no folder")
    files = sorted(file for file in args.folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ConfigError(f"{args.folder} has no pictures ({', '.join(sorted(SUFFIXES))})")
    stems, most = Counter(file.with_suffix("") for file in files).most_common(1)[0]
    if args.format != "coco" and most > 1:
        raise ConfigError(f"{stems}.* is {most} pictures, whose {args.format} labels would be one file; rename one")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: the folder {output.absolute().parent} does not exist")
    runtime = loading.load(args.path, options)
    pictures, failed = label(runtime, args.folder, files, args.questions, output, generation)
    boxes = sum(len(picture.boxes) for picture in pictures)
    write(pictures, output, args.format)
    print(f"{boxes} boxes on {len(pictures)} pictures: {output}")
    if truth is not None:
        found = agreement(to_coco(pictures), truth)
        print(
            f"precision {found.precision:.3f} ({found.right} of {found.found} boxes), recall {found.recall:.3f} "
            f"({found.right} of {found.known}), at an overlap of 0.5"
        )
    if failed:
        loading.say(f"{failed} pictures could not be read")
    return 1 if failed else 0


def label(
    runtime: "Runtime",
    folder: Path,
    files: list[Path],
    questions: list[str],
    output: Path,
    generation: dict[str, Any],
) -> tuple[list["Labelled"], int]:
    """Each picture with the boxes of all answers, the same one once; and how many could not be read."""
    from qvl_edge.batch import answer_each
    from qvl_edge.errors import QvlError
    from qvl_edge.labels import Labelled
    from qvl_edge.text.boxes import Box

    boxes: dict[Path, list[Box]] = {}
    sizes: dict[Path, tuple[int, int]] = {}
    for number, question in enumerate(questions, 1):
        kept = output.with_name(f"{output.name}.answers-{number}.jsonl")
        for file, answer in zip(files, answer_each(runtime, files, question, output=kept, **generation), strict=True):
            if isinstance(answer, QvlError):
                loading.say(f"{file}: {answer}")
                continue
            sizes[file] = answer.images[0].size
            boxes[file] = list(dict.fromkeys([*boxes.get(file, []), *answer.boxes]))
    pictures = [
        Labelled(file.relative_to(folder).as_posix(), *sizes[file], boxes[file]) for file in files if file in sizes
    ]
    return pictures, len(files) - len(pictures)


def write(pictures: list["Labelled"], output: Path, form: str) -> None:
    """The labels in `form`: one file, or a folder with a file for each picture."""
    from qvl_edge.files import write_json
    from qvl_edge.labels import categories, to_coco, to_labelme, to_yolo

    if form == "coco":
        write_json(output, to_coco(pictures))
        return
    names = categories(pictures)
    for picture in pictures:
        place = output / picture.file
        place.parent.mkdir(parents=True, exist_ok=True)
        if form == "labelme":
            write_json(place.with_suffix(".json"), to_labelme(picture))
        else:
            place.with_suffix(".txt").write_text(to_yolo(picture, names), encoding="utf-8")
    if form == "yolo":
        (output / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
