"""Answer one question about images: qvl-edge run BUNDLE --image a.jpg "question" [--draw out.png] [--json]"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_edge.commands import loading
from qvl_edge.options import GenerationOptions, LoadOptions

if TYPE_CHECKING:
    from qvl_edge.answer import Answer
    from qvl_edge.runtime import Runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge run`."""
    loading.add_arguments(parser)
    parser.add_argument("question", help="the question, or the text to continue with a base model")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="repeatable; Picture 1, Picture 2, …"
    )
    parser.add_argument("--system", help="the system prompt")
    parser.add_argument("--draw", metavar="OUT", help="write the last picture with the answer's boxes drawn on it")
    parser.add_argument("--json", action="store_true", help="the whole answer as JSON on stdout")


def execute(args: argparse.Namespace) -> int:
    """Stream the answer to stdout (or print JSON), speed to stderr."""
    from qvl_edge.errors import ImageError
    from qvl_edge.vision.image import load_image

    options, generation = LoadOptions.given(args), GenerationOptions.given(args)
    for image in args.image:  # errors before the model is loaded
        load_image(image)
    if args.draw and not args.image:
        raise ImageError("--draw needs an --image to draw on")
    if args.draw and not Path(args.draw).absolute().parent.is_dir():
        raise ImageError(f"--draw {args.draw}: the folder {Path(args.draw).absolute().parent} does not exist")
    runtime = loading.load(args.path, options)
    query: list[dict[str, Any]] = [*({"image": image} for image in args.image), {"text": args.question}]
    if args.system is not None:
        generation["system"] = args.system
    if args.json:
        answer = runtime.answer(query, **generation)
        print(json.dumps(answer.to_dict(), ensure_ascii=False))
    else:
        answer = stream(runtime, query, **generation)
    if args.draw:
        draw(answer, args.image, Path(args.draw))
    loading.say(summary(answer))
    return 0


def stream(runtime: "Runtime", query: list[dict[str, Any]], history: Any = None, **options: Any) -> "Answer":
    """Print the answer as it is generated. options: those of Runtime.answer."""
    from qvl_edge.answer import Answer

    for piece in runtime.answer_stream(query, history, **options):
        if isinstance(piece, Answer):
            print(flush=True)
            return piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    raise AssertionError("answer_stream ends with the Answer")


def draw(answer: "Answer", images: list[str], out: Path) -> None:
    """Write the picture that the boxes are on (the last)."""
    from qvl_edge.errors import ImageError
    from qvl_edge.text.draw import draw_boxes
    from qvl_edge.vision.image import load_image

    picture = draw_boxes(load_image(images[-1]), [box for box in answer.boxes if box.image == len(images) - 1])
    try:
        picture.save(out)
    except (OSError, ValueError) as error:  # ValueError: unknown file name extension
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
