"""qvl-edge: the command line. Each command is a file in qvl_edge/commands."""

import argparse
import importlib
import sys

from qvl_edge import QvlError, __version__
from qvl_edge.commands.loading import any_console, plain_warnings

COMMANDS = {
    "run": "answer one question about images",
    "chat": "talk about images, turn by turn",
    "serve": "an OpenAI-compatible API, and a page that draws the boxes",
    "pull": "fetch a model from a hub; resumes, and checks every hash",
    "fit": "estimate memory use, before a model is loaded or downloaded",
    "doctor": "check this machine: packages, GPU, every kernel, a bundle",
    "evaluate": "score answers on published evaluations, alone or against another model",
    "judge": "have another model score the answers of an evaluation",
    "bench": "measure speed and memory of a model, in llama-bench's format",
    "demo": "quantize, export and run the small model that ships with this package",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; a QvlError becomes its message and exit code 1."""
    parser = argparse.ArgumentParser(prog="qvl-edge", description="Qwen-VL on consumer GPUs and CPUs.")
    parser.add_argument("--version", action="version", version=f"qvl-edge {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"qvl_edge.commands.{name}")
        subparser = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(subparser)
        subparser.set_defaults(execute=module.execute)
    args = parser.parse_args(arguments)
    any_console()
    try:
        with plain_warnings():
            return int(args.execute(args))
    except QvlError as error:
        print(f"qvl-edge {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
