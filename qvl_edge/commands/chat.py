"""Talk about images, turn by turn. In the chat, /image FILE adds a picture; any other /word lists the commands."""

import argparse
import sys
from pathlib import Path
from typing import Any

from qvl_edge.commands import loading
from qvl_edge.options import GenerationOptions, LoadOptions

HELP = """/image FILE  add a picture to the next question
/draw FILE   save the last picture with the last answer's boxes
/clear       start a new conversation
/exit        leave (or Ctrl-D)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge chat`."""
    loading.add_arguments(parser)
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="pictures of the first question")
    parser.add_argument("--system", help="the system prompt")


def execute(args: argparse.Namespace) -> int:
    """Read lines from stdin, stream answers to stdout."""
    from qvl_edge.commands.run import stream, summary
    from qvl_edge.errors import QvlError
    from qvl_edge.vision.image import load_image

    options, generation = LoadOptions.given(args), GenerationOptions.given(args)
    if args.system is not None:
        generation["system"] = args.system
    for image in args.image:
        load_image(image)
    loading.check_chat(args.path, options)
    runtime = loading.load(args.path, options)
    history: list[tuple[Any, str]] = []
    pictures: list[str] = list(args.image)
    loading.say(HELP)
    while (line := _read()) is not None:
        command, _, argument = line.partition(" ")
        try:
            if command in ("/exit", "/quit"):
                break
            if command == "/clear":
                history, pictures = [], []
            elif command == "/image":
                load_image(argument.strip())
                pictures.append(argument.strip())
            elif command == "/draw":
                _draw(runtime, history, argument.strip())
            elif command.startswith("/"):
                loading.say(HELP)
            elif line.strip():
                query = [*({"image": picture} for picture in pictures), {"text": line}]
                answer = stream(runtime, query, history, **generation)
                loading.say(summary(answer))
                history.append((query, answer.text))
                pictures = []
        except QvlError as error:
            loading.say(str(error))
        except KeyboardInterrupt:
            loading.say("\nstopped; this turn is discarded")
    return 0


def _read() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _draw(runtime: Any, history: list[tuple[Any, str]], out: str) -> None:
    picture = runtime.draw_bbox_on_latest_picture(history[-1][1], history) if history else None
    if picture is None:
        loading.say("there is no picture, or the last answer has no boxes")
        return
    try:
        picture.save(Path(out))
    except (OSError, ValueError) as error:
        loading.say(f"{out}: {error}")
    else:
        loading.say(f"saved {out}")
