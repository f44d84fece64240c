"""qvl-edge: the command line. Each command is a file in qvl_edge/commands."""

import argparse
import difflib
import importlib
import re
import sys
from typing import NoReturn

from qvl_edge import __version__
from qvl_edge.commands.loading import any_console, run_command

COMMANDS = {
    "run": "answer one question about images",
    "chat": "talk about images, turn by turn",
    "label": "label a folder of pictures with boxes, as COCO, YOLO or Labelme",
    "serve": "an OpenAI-compatible API, and a page that draws the boxes",
    "pull": "fetch a model from a hub; resumes, and checks every hash",
    "fit": "estimate memory use, before a model is loaded or downloaded",
    "doctor": "check this machine: packages, GPU, every kernel, a bundle",
    "evaluate": "score answers on published evaluations, alone or against another model",
    "judge": "have another model score the answers of an evaluation",
    "bench": "measure speed and memory of a model, in llama-bench's format",
    "demo": "quantize, export and run the small model that ships with this package",
    "completion": "print the completion script of a shell",
}
EPILOG = """\
Results go to stdout, progress to stderr. NO_COLOR turns colours off.
Exit codes: 0 done; 1 it failed, and stderr says why; 2 the command line is wrong; 130 stopped by Ctrl-C;
141 the program that read the output ended; 143 stopped by SIGTERM."""


class Parser(argparse.ArgumentParser):
    """With the nearest words that exist, in the message about one that does not."""

    def error(self, message: str) -> NoReturn:
        """Print usage and the message; exit code 2."""
        if message.startswith("unrecognized arguments: -"):
            word = message.split()[2].partition("=")[0]
            message += _meant(word, [option for one in [self, *self.commands] for option in one._option_string_actions])
        elif message.startswith("unrecognized arguments: "):
            message += "; several values take the option again: --image a.png --image b.png"
        elif found := re.match(r"argument COMMAND: invalid choice: '(.*?)'", message):
            message = f"there is no command {found[1]!r}{_meant(found[1], COMMANDS)}; qvl-edge --help lists them"
        super().error(message)

    @property
    def commands(self) -> list[argparse.ArgumentParser]:
        """The parsers of the commands."""
        found = [action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return [parser for choices in found for parser in choices.values()]


def _meant(word: str, known: "list[str] | dict[str, str]") -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def make_parser() -> Parser:
    """The parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    about = "Qwen-VL on consumer GPUs and CPUs."
    parser = Parser(prog="qvl-edge", description=about, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"qvl-edge {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"qvl_edge.commands.{name}")
        subparser = commands.add_parser(
            name, help=summary, description=module.__doc__, epilog=module.EXAMPLES, formatter_class=raw
        )
        module.add_arguments(subparser)
        subparser.set_defaults(execute=module.execute)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit code."""
    any_console()
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 0
    return run_command(f"qvl-edge {args.command}", lambda: int(args.execute(args)))


if __name__ == "__main__":
    sys.exit(main())
