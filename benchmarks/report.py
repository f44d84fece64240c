"""Shared by the benchmarks' commands: parser, tables, saved results, error exits."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qvl_edge.commands.loading import say
from qvl_edge.errors import QvlError
from qvl_edge.files import write_json
from qvl_edge.machine import describe_machine
from qvl_edge.options import LoadOptions


def command(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`; doc: the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def model_command(
    name: str, doc: str | None, *, leave_out: Sequence[str] = (), save: str = "--json", **defaults: Any
) -> argparse.ArgumentParser:
    """`command` with a model's PATH, LoadOptions with other `defaults`, and the option `save`."""
    parser = command(name, doc)
    parser.add_argument("path", metavar="PATH", help="a bundle or a checkpoint")
    add_save(parser, save)
    shown = ", ".join(f"{option} {value}" for option, value in defaults.items() if option not in leave_out)
    title = f"loading (defaults here: {shown})" if shown else "loading"
    LoadOptions.add_arguments(parser.add_argument_group(title), leave_out=leave_out)
    parser.set_defaults(**defaults)
    return parser


def add_save(parser: argparse.ArgumentParser, flag: str = "--json") -> None:
    """The option with the path for `save`."""
    parser.add_argument(flag, type=Path, metavar="FILE.json", help="save the result, with machine, versions and commit")


def save(path: Path | None, name: str, device: str, **figures: Any) -> None:
    """Write a result and the machine as JSON, atomically; nothing if `path` is None."""
    if path is not None:
        write_json(path, {"benchmark": name, **describe_machine(device), **figures})


def print_machine(device: str) -> None:
    """The line above a table."""
    machine = describe_machine(device)
    versions = machine["versions"]
    print(f"{machine['device']}, {machine['threads']} of {machine['cores']} cores, torch {versions['torch']}\n")


@contextlib.contextmanager
def exits_with_its_message(program: str) -> Iterator[None]:
    """Exit `python -m program` with the message of a QvlError and code 1; also a decorator."""
    try:
        yield
    except QvlError as error:
        raise SystemExit(f"{program}: {error}") from None
    except KeyboardInterrupt:
        say("stopped")
        raise SystemExit(130) from None
