"""What the commands that load a model share."""

import argparse
import io
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from qvl_edge.options import GenerationOptions, LoadOptions

if TYPE_CHECKING:
    from qvl_edge.runtime import Runtime


def add_arguments(parser: argparse.ArgumentParser, *, optional_path: bool = False) -> None:
    """The model, how it is loaded, and how it generates. optional_path: the command has other names for BUNDLE too."""
    nargs = "?" if optional_path else None
    parser.add_argument("path", metavar="BUNDLE", nargs=nargs, help="a bundle, a checkpoint, or OWNER/NAME on a hub")
    LoadOptions.add_arguments(parser)
    group = parser.add_argument_group("generation (the model's own generation_config.json goes before these defaults)")
    GenerationOptions.add_arguments(group)


def add_source(parser: argparse.ArgumentParser) -> None:
    """--source and --revision alone, for a command that only finds a model."""
    others = {item.name for item in fields(LoadOptions)} - {"source", "revision"}
    LoadOptions.add_arguments(parser, leave_out=others)
    parser.set_defaults(source=LoadOptions.source)


def load(path: str, options: dict[str, Any]) -> "Runtime":
    """The Runtime, with progress on stderr."""
    from qvl_edge.runtime import Runtime  # imports torch

    began = time.perf_counter()
    runtime = Runtime.from_pretrained(path, progress=say, **options)
    say(f"loaded {path} in {time.perf_counter() - began:.1f} s")
    if runtime.decoder.device.type == "cuda":
        say("kernels are compiled when they first run on this machine (13 s on two cores) and kept in Triton's cache")
    return runtime


def check_chat(path: str, options: dict[str, Any]) -> None:
    """ConfigError if the model continues text, unless --chat-format says which it is to do; before it is loaded."""
    from qvl_edge.checkpoint import raw_reason
    from qvl_edge.errors import ConfigError
    from qvl_edge.hub import local_folder

    if options.get("chat_format") is None:
        places = {name: options[name] for name in ("source", "revision") if name in options}
        folder = local_folder(path, **places, progress=say)
        if (folder / "config.json").exists() and (reason := raw_reason(folder)):  # else loading it says what is wrong
            raise ConfigError(f"{reason}; or --chat-format raw to use it as it is")


def any_console() -> None:
    """Let characters that a console's encoding lacks (cp1252, GBK) be written as escapes, instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(line: str) -> None:
    """A line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show warnings as lines of progress, each once, without the line of code that it comes from."""
    shown = set[str]()

    def show(message: str) -> None:
        if message not in shown:
            shown.add(message)
            say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: show(str(message))
        yield
