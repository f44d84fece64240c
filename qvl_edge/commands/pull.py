"""Fetch a model from a hub and check its hashes: qvl-edge pull Qwen/Qwen-VL-Chat-Int4 [--source modelscope] [--to DIR]

Prints what is fetched and how large it is; after a stop, the same command resumes. The folder is printed at the end.
"""

import argparse
from pathlib import Path

from qvl_edge.commands.loading import add_source, say

EXAMPLES = """examples:
  qvl-edge pull Qwen/Qwen-VL-Chat-Int4
  qvl-edge pull Qwen/Qwen-VL-Chat-Int4 --source modelscope --to models/int4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge pull`."""
    parser.add_argument("name", metavar="OWNER/NAME", help="such as Qwen/Qwen-VL-Chat-Int4")
    add_source(parser)
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="plain files there, to copy elsewhere (default: the hub's own cache)"
    )


def execute(args: argparse.Namespace) -> int:
    """Fetch; the folder goes to stdout."""
    from qvl_edge.hub import fetch

    print(fetch(args.name, source=args.source, revision=args.revision, to=args.to, progress=say))
    return 0
