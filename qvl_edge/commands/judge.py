"""Have another model score answers: qvl-edge judge REQUESTS.jsonl VERDICTS.jsonl --model NAME --judge https://HOST/v1

REQUESTS is what `qvl-edge evaluate --task touchstone` writes. Every verdict is kept as it comes; run again, the command
only asks for what is missing. Nothing is sent without --judge; then the verdicts that exist are scored. The key is read
from an environment variable and sent to that address only.
"""

import argparse
import os
from pathlib import Path

KEY_VARIABLE = "JUDGE_API_KEY"

EXAMPLES = """examples:
  qvl-edge judge quality/requests.jsonl verdicts.jsonl --model gpt-4 --judge https://HOST/v1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge judge`."""
    parser.add_argument("requests", type=Path, metavar="REQUESTS.jsonl")
    parser.add_argument("verdicts", type=Path, metavar="VERDICTS.jsonl")
    parser.add_argument("--judge", metavar="URL", help="base URL of an OpenAI-compatible API, like https://HOST/v1")
    parser.add_argument("--model", required=True, metavar="NAME", help="the judge's name there")
    parser.add_argument(
        "--key-env", default=KEY_VARIABLE, metavar="NAME", help=f"environment variable with the key ({KEY_VARIABLE})"
    )


def execute(args: argparse.Namespace) -> int:
    """Ask for missing verdicts, then print the scores."""
    from qvl_edge.errors import QvlError
    from qvl_edge.evaluate.intervals import mean_of
    from qvl_edge.evaluate.judge import Judge, ask_all, read_requests, read_verdicts
    from qvl_edge.evaluate.report import figure, shown
    from qvl_edge.evaluate.touchstone import metrics

    try:
        requests = read_requests(args.requests)
        if args.judge:
            judge = Judge(args.judge, args.model, os.environ.get(args.key_env, "").strip())
            verdicts = ask_all(judge, requests, args.verdicts)
        else:
            verdicts = read_verdicts(args.verdicts, requests, args.model)
    except QvlError:
        raise
    except OSError as error:
        raise QvlError(str(error)) from None
    if not verdicts:
        raise QvlError(
            f"{args.verdicts} has no verdict of {args.model} on these requests; add --judge URL to ask for them"
        )
    print(f"{len(verdicts)} of {len(requests)} verdicts")
    for metric in metrics(requests, verdicts):
        print(f"{metric.name} {figure(shown(metric, mean_of(metric.values)), '.1f')}")
    return 0
