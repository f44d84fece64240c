"""Fetch a model from a hub, checked: qvl-edge pull Qwen/Qwen-VL-Chat-Int4 [--source modelscope] [--to FOLDER]

Says what it fetches and how large it is, then fetches it; stopped, the same command goes on. The folder is printed.
"""

import argparse
from pathlib import Path

from qvl_edge.commands import loading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge pull`."""
    parser.add_argument("name", metavar="OWNER/NAME", help="such as Qwen/Qwen-VL-Chat-Int4")
    loading.add_source(parser)
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="plain files there, to be carried elsewhere (the hub's cache)"
    )


def execute(args: argparse.Namespace) -> int:
    """Fetch; the folder goes to stdout."""
    from qvl_edge.hub import fetch

    print(fetch(args.name, source=args.source, revision=args.revision, to=args.to, progress=loading.say))
    return 0
