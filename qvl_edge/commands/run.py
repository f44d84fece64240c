"""Answer one question about images: qvl-edge run BUNDLE --image a.jpg "question" [--draw out.png] [--json]

Where the answer goes to a terminal it is printed without its markup, and the boxes below it in pixels; elsewhere, and
with --raw, as the model wrote it. `-` is a picture on stdin (--image -), or the question.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_edge.commands import loading
from qvl_edge.options import LoadOptions

if TYPE_CHECKING:
    from qvl_edge.answer import Answer
    from qvl_edge.runtime import Runtime

EXAMPLES = """examples:
  qvl-edge run BUNDLE --image street.jpg "框出红色的车" --draw out.png
  qvl-edge run BUNDLE --image before.jpg --image after.jpg "What has changed?"
  qvl-edge run BUNDLE --each "How many people are there?" photos/*.jpg > answers.jsonl
  curl -s https://example.org/a.jpg | qvl-edge run BUNDLE --image - "What is this?" """


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge run`."""
    loading.add_path(parser)
    parser.add_argument("question", help="the question, or the text to continue with a base model; -: from stdin")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="more pictures, after those of --image")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="repeatable; Picture 1, Picture 2, …; -: stdin"
    )
    parser.add_argument(
        "--each", action="store_true", help="ask about each picture on its own; a line of JSON for each"
    )
    parser.add_argument("--system", help="the system prompt")
    parser.add_argument("--draw", metavar="OUT", help="write the last picture with the answer's boxes drawn on it")
    parser.add_argument("--json", action="store_true", help="the whole answer as JSON on stdout")
    parser.add_argument("--raw", action="store_true", help="print <ref> and <box> on a terminal too")
    loading.add_options(parser)


def execute(args: argparse.Namespace) -> int:
    """Stream the answer to stdout (or print JSON), speed to stderr."""
    from qvl_edge.errors import ImageError, PromptError
    from qvl_edge.vision.image import load_image

    options, generation = LoadOptions.given(args), loading.generation(args)
    names = [*args.image, *args.images]
    if [*names, args.question].count("-") > 1:
        raise PromptError("- stands for stdin more than once; it can be read once only")
    images: list[Any] = [sys.stdin.buffer.read() if name == "-" else name for name in names]
    question = sys.stdin.read().strip() if args.question == "-" else args.question
    for image in images if not args.each else []:  # errors before the model is loaded
        load_image(image)
    if args.draw and (not images or args.each):
        raise ImageError("--draw needs an --image to draw on, and is not for --each")
    if args.each and (args.system is not None or not images):
        raise PromptError("--each needs pictures, and takes no --system")
    if args.draw:
        loading.check_drawing(args.draw)
    runtime = loading.load(args.path, {**options, "slots": 4} if args.each else options)
    if args.each:
        return ask_each(runtime, images, names, question, generation)
    query: list[dict[str, Any]] = [*({"image": image} for image in images), {"text": question}]
    if args.system is not None:
        generation["system"] = args.system
    if args.json:
        answer = runtime.answer(query, **generation)
        loading.print_json(answer.to_dict())
    else:
        answer = stream(runtime, query, plain=sys.stdout.isatty() and not args.raw, **generation)
    if args.draw:
        draw(answer, len(images) - 1, Path(args.draw))
    loading.say(summary(answer))
    return 0


def ask_each(runtime: "Runtime", images: list[Any], names: list[str], question: str, generation: dict[str, Any]) -> int:
    """A line of JSON for each picture, in their order; 1 if one of them could not be answered."""
    from qvl_edge.batch import answer_each
    from qvl_edge.errors import QvlError

    failed = False
    for name, answer in zip(names, answer_each(runtime, images, question, **generation), strict=True):
        failed |= isinstance(answer, QvlError)
        row = {"error": str(answer)} if isinstance(answer, QvlError) else answer.to_dict()
        loading.print_json({"image": name, **row})
        sys.stdout.flush()
    return int(failed)


def stream(runtime: "Runtime", query: Any, history: Any = None, *, plain: bool = False, **options: Any) -> "Answer":
    """Print the answer as it is generated; `plain`: without markup, and the boxes below. options: of Runtime.answer."""
    from qvl_edge.answer import Answer
    from qvl_edge.text.boxes import plain_text

    text, shown = "", 0
    for piece in runtime.answer_stream(query, history, **options):
        if isinstance(piece, Answer):
            print(flush=True)
            for box in piece.boxes if plain else ():
                print(f"  {box.label or 'box'}: {', '.join(map(str, box.pixels))}")
            return piece
        text += piece
        ready = plain_text(text) if plain else text
        sys.stdout.write(ready[shown:])
        sys.stdout.flush()
        shown = max(shown, len(ready))
    raise AssertionError("answer_stream ends with the Answer")


def draw(answer: "Answer", image: int, out: Path) -> None:
    """Write a picture with the boxes that are on it."""
    from qvl_edge.errors import ImageError

    try:
        answer.draw(image).save(out)
    except (OSError, ValueError) as error:
        raise ImageError(f"--draw {out}: {error}") from None
    loading.say(f"{len(answer.boxes)} boxes drawn on {out}")


def summary(answer: "Answer") -> str:
    """One line: tokens and speed."""
    usage, timing = answer.usage, answer.timing
    images = f"{usage.images} images {timing.image_s:.2f} s | " if usage.images else ""
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    return (
        f"{images}prompt {usage.prompt_tokens} tokens{cached} {timing.prefill_s:.2f} s | "
        f"answer {usage.completion_tokens} tokens {timing.decode_tokens_per_s:.1f} tokens/s | "
        f"finish: {answer.finish_reason}"
    )
