"""Check this machine: what is installed, the card, every kernel against its definition; and a bundle, if one is named.

Every failure comes with a one-line fix. Exit code 1 if anything failed.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qvl_edge.commands import loading

if TYPE_CHECKING:
    from qvl_edge.doctor import Finding

EXAMPLES = """examples:
  qvl-edge doctor
  qvl-edge doctor BUNDLE --json"""
MARKS = {"ok": "✓", "failed": "✗", "skipped": "–"}
PLAIN = {"ok": "ok", "failed": "!!", "skipped": "--"}  # for a terminal whose encoding has no check marks
WIDTH = 16  # of the longest name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge doctor`."""
    parser.add_argument("path", nargs="?", type=Path, metavar="BUNDLE", help="a bundle or a checkpoint to check too")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def execute(args: argparse.Namespace) -> int:
    """Print each finding as soon as it is known."""
    from qvl_edge.doctor import examine

    marks = MARKS if loading.can_show("".join(MARKS.values())) else PLAIN
    findings = []
    for finding in examine(args.path):
        findings.append(finding)
        if not args.json:
            print(line(finding, marks), flush=True)
    failed = sum(finding.status == "failed" for finding in findings)
    if args.json:
        loading.print_json({"ok": not failed, "findings": [vars(finding) for finding in findings]})
    else:
        print(f"\n{failed} failed" if failed else "\nall checks passed")
    return 1 if failed else 0


def line(finding: "Finding", marks: dict[str, str] = MARKS) -> str:
    """A finding as it is printed; its fix on a line of its own."""
    first = f"{marks[finding.status]} {finding.name:{WIDTH}}  {finding.found}"
    return f"{first}\n  → {finding.fix}" if finding.fix else first
