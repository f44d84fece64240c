"""Check this machine: what is installed, the card, every kernel against its definition; and a bundle, if one is named.

Every failure comes with one line that mends it. Exit code 1 if anything failed.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvl_edge.doctor import Finding

MARKS = {"ok": "✓", "failed": "✗", "skipped": "–"}
PLAIN = {"ok": "ok", "failed": "!!", "skipped": "--"}  # for a terminal that cannot show them
WIDTH = 16  # of the longest name
SUMMARIES = {"en": ("all is well", "{} failed"), "zh": ("一切正常", "{} 项未通过")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge doctor`."""
    parser.add_argument("path", nargs="?", type=Path, metavar="BUNDLE", help="a bundle or a checkpoint to check too")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--lang", choices=("en", "zh"), help="of the findings (as LANG says, else English)")


def execute(args: argparse.Namespace) -> int:
    """Print each finding as it comes."""
    from qvl_edge.doctor import examine

    language = args.lang or user_language()
    marks = MARKS if _can_show("".join(MARKS.values())) else PLAIN
    findings = []
    for finding in examine(args.path):
        findings.append(finding.in_language(language))
        if not args.json:
            print(line(findings[-1], marks), flush=True)
    failed = sum(finding.status == "failed" for finding in findings)
    if args.json:
        print(json.dumps({"ok": not failed, "findings": [vars(finding) for finding in findings]}, ensure_ascii=False))
    else:
        well, ill = SUMMARIES[language]
        print(f"\n{ill.format(failed) if failed else well}")
    return 1 if failed else 0


def line(finding: "Finding", marks: dict[str, str] = MARKS) -> str:
    """A finding as it is printed; its fix on a line of its own."""
    first = f"{marks[finding.status]} {finding.name:{WIDTH}}  {finding.found}"
    return f"{first}\n  → {finding.fix}" if finding.fix else first


def user_language() -> str:
    """ "zh" where the locale is Chinese, else "en"."""
    said = next((os.environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(name)), "")
    return "zh" if said.lower().startswith("zh") else "en"


def _can_show(characters: str) -> bool:
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
