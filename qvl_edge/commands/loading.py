"""What the commands that load a model share."""

import argparse
import io
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_edge.errors import EngineError, QvlError
from qvl_edge.files import system_error
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


EXTRAS = {  # of setup.py, by the package that is missing
    "onnxruntime": "cpu] or qvl-edge[cuda",
    "onnx": "export",
    "huggingface_hub": "download",
    "modelscope_hub": "modelscope",
    "matplotlib": "plot",
    "openai": "evaluate",
    **dict.fromkeys(("starlette", "uvicorn", "h11", "pydantic", "llguidance"), "serve"),
}


def run_command(name: str, execute: Callable[[], int], *, stopped: str = "stopped") -> int:
    """The exit code of a command: 1 and a line for what its user or the system has to mend, 130 when it is stopped.

    SIGTERM ends it as an exception does, so that nothing half written stays, with a shell's 143.
    """
    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()  # the only one that may set a handler
    before = signal.signal(signal.SIGTERM, terminate) if main_thread else None
    try:
        with plain_warnings():
            code = execute()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would fail on it at its end
        return 141
    except (QvlError, EngineError) as error:
        say(f"{name}: {error}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        say(
            f"{name}: the package {package} is not installed; install qvl-edge[{EXTRAS[package]}], in a clone with\n"
            f"  pip install -c constraints.txt -e '.[{EXTRAS[package].partition(']')[0]}]'"
        )
    except OSError as error:
        say(f"{name}: {system_error(error)}")
    except MemoryError:
        say(f"{name}: there is no memory left; `qvl-edge fit` says how much a model takes, and with which options less")
    except KeyboardInterrupt:
        say(stopped)
        return 143 if terminated else 130
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)
    return 1


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
