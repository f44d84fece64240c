"""Talk about images, turn by turn. In the chat, /image FILE adds a picture; /help lists the other commands."""

import argparse
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_edge.commands import loading
from qvl_edge.commands.run import stream, summary
from qvl_edge.errors import ImageError, PromptError, QvlError
from qvl_edge.options import LoadOptions

if TYPE_CHECKING:
    from qvl_edge.answer import Answer
    from qvl_edge.runtime import Runtime

EXAMPLES = """examples:
  qvl-edge chat BUNDLE
  qvl-edge chat BUNDLE --image street.jpg --greedy"""
HELP = """/image FILE         add a picture, or several, to the next question
/box X1 Y1 X2 Y2    put this region of the last picture, in pixels, where the next question says {box}, or before it
/draw FILE          save the last picture with the last answer's boxes
/history            print the conversation
/clear              start a new conversation
/exit               leave (or Ctrl-D)
Three quotes \"\"\" begin and end a question of several lines. Ctrl-C stops an answer, which is then left out."""
QUOTES = '"""'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge chat`."""
    loading.add_path(parser)
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="pictures of the first question")
    parser.add_argument("--system", help="the system prompt")
    parser.add_argument("--raw", action="store_true", help="print <ref> and <box> on a terminal too")
    loading.add_options(parser)


def execute(args: argparse.Namespace) -> int:
    """Read lines from stdin, stream answers to stdout."""
    from qvl_edge.vision.image import load_image

    options, generation = LoadOptions.given(args), loading.generation(args)
    if args.system is not None:
        generation["system"] = args.system
    for image in args.image:
        load_image(image)
    loading.check_chat(args.path, options)
    chat = Chat(loading.load(args.path, options), generation, args.image, plain=sys.stdout.isatty() and not args.raw)
    loading.say(HELP)
    terminal = sys.stdin.isatty()
    if terminal:
        _edit_lines()
    while True:
        try:
            if (line := _read(terminal)) is None or not chat.obey(line):
                return 0
        except QvlError as error:
            loading.say(str(error))
        except KeyboardInterrupt:
            if not terminal:
                raise
            loading.say("\nCtrl-D or /exit leaves")


class Chat:
    """A conversation, and what waits for its next question."""

    def __init__(self, runtime: "Runtime", generation: dict[str, Any], pictures: list[str], *, plain: bool):
        self.runtime, self.generation, self.plain = runtime, generation, plain
        self.pictures, self.box = list(pictures), ""
        self.history: list[tuple[Any, str]] = []
        self.answer: Answer | None = None

    def obey(self, line: str) -> bool:
        """Do what a line says; False where it says to leave."""
        command, _, rest = line.strip().partition(" ")
        if command in ("/exit", "/quit", "/bye"):
            return False
        if command == "/clear":
            self.history, self.pictures, self.box, self.answer = [], [], "", None
        elif command == "/image":
            self._add(rest)
        elif command == "/box":
            self._mark(rest)
        elif command == "/draw":
            self._draw(rest.strip())
        elif command == "/history":
            for query, answer in self.history:
                print(f"> {self.runtime.from_list_format(_named(query)).strip()}\n{answer}")
        elif command.startswith("/") and "/" not in command[1:]:  # "/usr/…" begins a question
            loading.say(HELP)
        elif line.strip():
            self._ask(line.strip())
        return True

    def _ask(self, text: str) -> None:
        if self.box:
            text = text.replace("{box}", self.box) if "{box}" in text else f"{self.box} {text}"
        query = [*({"image": picture} for picture in self.pictures), {"text": text}]
        try:
            self.answer = stream(self.runtime, query, self.history, plain=self.plain, **self.generation)
        except KeyboardInterrupt:  # pictures and region wait for the next question
            loading.say("\nstopped; this turn is left out")
            return
        loading.say(summary(self.answer))
        self.history.append((query, self.answer.text))
        self.pictures, self.box = [], ""

    def _add(self, names: str) -> None:
        from qvl_edge.vision.image import load_image

        for name in _paths(names):
            load_image(name)
            self.pictures.append(name)
            loading.say(f"Picture {len(self.pictures)} of the next question: {name}")

    def _mark(self, numbers: str) -> None:
        from qvl_edge.text.boxes import GRID
        from qvl_edge.text.prompt import latest_picture
        from qvl_edge.vision.image import load_frame

        picture = self.pictures[-1] if self.pictures else latest_picture(self.history)
        if picture is None:
            raise PromptError("there is no picture to put a box on; add one with /image FILE")
        width, height = load_frame(picture).size
        try:
            x1, y1, x2, y2 = map(int, numbers.replace(",", " ").split())
        except ValueError:
            raise PromptError("/box takes four whole numbers, X1 Y1 X2 Y2") from None
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise PromptError(f"/box {x1} {y1} {x2} {y2} is not within the picture, which is {width} x {height} pixels")
        x1, x2, y1, y2 = (
            min(v * GRID // side, GRID - 1)
            for v, side in zip((x1, x2, y1, y2), (width, width, height, height), strict=True)
        )
        self.box = f"<box>({x1},{y1}),({x2},{y2})</box>"
        loading.say(f"the next question has {self.box}")

    def _draw(self, out: str) -> None:
        picture = self.runtime.draw_bbox_on_latest_picture(self.history[-1][1], self.history) if self.history else None
        if picture is None:
            loading.say("there is no picture, or the last answer has no boxes")
            return
        loading.check_drawing(out)
        try:
            picture.save(Path(out))
        except (OSError, ValueError) as error:
            raise ImageError(f"{out}: {error}") from None
        loading.say(f"saved {out}")


def _named(query: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: str(value) for name, value in element.items()} for element in query]


def _paths(names: str) -> list[str]:
    """One path as it is, or the words of a shell: a terminal puts quotes around a file that is dropped on it."""
    name = names.strip()
    if not name:
        raise ImageError("/image takes a file, as in /image street.jpg")
    if os.path.exists(name):
        return [name]
    try:
        return [os.path.expanduser(word) for word in shlex.split(name)]
    except ValueError as error:
        raise ImageError(f"/image {name}: {error}") from None


def _edit_lines() -> None:
    """Arrow keys, and the questions of earlier chats, where Python has readline."""
    from qvl_edge.files import cache_home

    with suppress(ImportError, OSError):
        import atexit
        import readline

        kept = cache_home() / "chat_history"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.touch(mode=0o600)
        readline.read_history_file(kept)
        readline.set_history_length(1000)
        atexit.register(readline.write_history_file, kept)


def _read(terminal: bool) -> str | None:
    """The next line, or lines within three quotes; None at the end."""
    try:
        line = input("> " if terminal else "")
        if line.strip().startswith(QUOTES):
            line = line.strip().removeprefix(QUOTES)
            while not line.rstrip().endswith(QUOTES):
                line += "\n" + input("… " if terminal else "")
            line = line.rstrip().removesuffix(QUOTES)
        return line
    except EOFError:
        return None
