"""What the commands that load a model share."""

import argparse
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_edge.options import GenerationOptions, LoadOptions

if TYPE_CHECKING:
    from qvl_edge.runtime import Runtime


def add_path(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """The model. optional: the command has other names for BUNDLE too."""
    nargs = "?" if optional else None
    parser.add_argument("path", metavar="BUNDLE", nargs=nargs, help="a bundle, a checkpoint, or OWNER/NAME on a hub")


def add_options(parser: argparse.ArgumentParser) -> None:
    """How the model is loaded, and how it generates."""
    LoadOptions.add_arguments(parser)
    group = parser.add_argument_group("generation (the model's own generation_config.json goes before these defaults)")
    GenerationOptions.add_arguments(group)


def generation(args: argparse.Namespace) -> dict[str, Any]:
    """The generation options of a command line, checked together too: ConfigError before the model is loaded."""
    given = GenerationOptions.given(args)
    GenerationOptions().with_overrides(given)
    return given


def check_drawing(out: str) -> None:
    """ImageError if no picture can be saved as `out`."""
    from PIL import Image

    from qvl_edge.errors import ImageError

    Image.init()
    path = Path(out).absolute()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ImageError(f"--draw {out}: unknown file extension {path.suffix!r}; use .png or .jpg")
    if not path.parent.is_dir():
        raise ImageError(f"--draw {out}: the folder {path.parent} does not exist")


def print_json(value: Any) -> None:
    """JSON on stdout; in ASCII where the terminal has no other letters."""
    text = json.dumps(value, ensure_ascii=False)
    print(text if can_show(text) else json.dumps(value))


def can_show(text: str) -> bool:
    """Whether stdout's encoding has all of these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def colourful() -> bool:
    """Whether to print in colours: on a terminal, unless NO_COLOR is set (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


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
