"""How good a model's answers are, and what quantizing it cost:

    python -m qvl_edge.evaluate BUNDLE --against CHECKPOINT --task textvqa --data textvqa_val.jsonl --images DIR

PATH and --against are bundles or checkpoints; both answer the same items, one model in memory at a time. Predictions
are saved as they come: stopped at any moment, the same command goes on and ends in the same report. docs/quality.md has
the tasks with the format of their files.
"""

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

from qvl_edge import Runtime
from qvl_edge.bundle import is_bundle
from qvl_edge.errors import QvlError
from qvl_edge.evaluate import report as reports
from qvl_edge.evaluate.item import Item, Prediction
from qvl_edge.evaluate.judge import write_requests
from qvl_edge.evaluate.model import describe, identity, name_of
from qvl_edge.evaluate.predict import Predictor, Predicts, predict_all
from qvl_edge.evaluate.report import Scored
from qvl_edge.evaluate.task import QualityDataError, Task
from qvl_edge.evaluate.tasks import TASKS, perplexity
from qvl_edge.evaluate.tasks.perplexity import PERPLEXITY
from qvl_edge.files import replacing, sha256_of, write_json
from qvl_edge.hub import local_folder
from qvl_edge.machine import describe_machine
from qvl_edge.options import PROFILES, Head, KVType
from qvl_edge.text.tokenizer import VOCAB_FILE, Tokenizer
from qvl_edge.vision.image import load_image


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qvl_edge.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="PATH", help="the model: a bundle, a checkpoint, or OWNER/NAME on a hub")
    parser.add_argument("--against", metavar="PATH", help="another one, to compare with: the float checkpoint, say")
    parser.add_argument("--task", required=True, choices=sorted(TASKS), metavar="NAME", help=", ".join(sorted(TASKS)))
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="the task's file, as published")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where its images are (the file's own folder)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    parser.add_argument(
        "--out", type=Path, default=Path("quality"), metavar="DIR", help="predictions, reports (quality)"
    )
    parser.add_argument("--language", choices=sorted(reports.WORDS), default="en", help="of the page")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="answers made at once (4)")
    parser.add_argument(
        "--seqlen", type=int, default=1024, metavar="N", help="tokens of a passage of perplexity (1024)"
    )
    group = parser.add_argument_group("loading, of both models")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--max-context", type=int, default=1024, metavar="N", help="positions of an answer (1024)")
    group = parser.add_argument_group("loading, of PATH only")
    group.add_argument("--dtype", help="of the arithmetic (float32, on CUDA float16)")
    group.add_argument("--profile", choices=tuple(PROFILES), help="for head and cache, and a checkpoint's tower (12g)")
    group.add_argument("--kv-cache", choices=get_args(KVType), help="by hand")
    group.add_argument("--head", choices=get_args(Head), help="by hand")
    return parser.parse_args(arguments)


def model_options(args: argparse.Namespace, path: Path, *, against: bool) -> dict[str, Any]:
    """What Runtime.from_pretrained takes. Nothing is left to the memory that happens to be free."""
    profile = "12g" if against else args.profile or "12g"
    options = {
        "device": args.device,
        "max_context": args.max_context,
        "slots": args.batch,
        "profile": "auto" if is_bundle(path) else profile,  # a bundle's tower is what it is
        "head": PROFILES[profile].head,
        "kv_cache": PROFILES[profile].kv_cache,
    }
    names = () if against else ("dtype", "kv_cache", "head")
    return options | {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def say(line: str) -> None:
    """A line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """How far the predictions are, on stderr."""

    def __init__(self, name: str):
        self.name, self._began, self._from = name, time.perf_counter(), -1

    def __call__(self, done: int, total: int) -> None:
        """Show it."""
        if self._from < 0:
            self._from = done
            if done:
                say(f"{self.name}: {done} of {total} are there from an earlier run")
            return
        seconds = (time.perf_counter() - self._began) / max(1, done - self._from) * (total - done)
        say(f"{self.name}: {done} of {total}, {seconds / 60:.1f} min left")


@dataclass(frozen=True)
class Data:
    """What is asked: the items, what they are by hash, and what answers them with a loaded model."""

    items: Sequence[Item]
    about: dict[str, Any]
    predictor: Callable[[Runtime], Predicts]


def open_data(args: argparse.Namespace, task: Task) -> Data:
    """Read the task's file. QualityDataError says what is wrong with it."""
    if not args.data.exists():
        raise QualityDataError(f"{args.data} does not exist; docs/quality.md says what {task.name} needs")
    if task is PERPLEXITY:
        tokenizer = Tokenizer.from_file(local_folder(args.path, progress=say) / VOCAB_FILE)
        items, passages = perplexity.read(args.data, tokenizer, seqlen=args.seqlen)

        def predictor(runtime: Runtime) -> Predicts:
            return perplexity.PassagePredictor(runtime, passages)
    else:
        items = task.read(args.data, args.images)

        def predictor(runtime: Runtime) -> Predicts:
            return Predictor(runtime, chat_format=task.chat_format, generation=task.generation)

    if not items:
        raise QualityDataError(f"{args.data} holds no item; docs/quality.md has the format of {task.name}")
    items = first_items(items, args.limit)
    twice = next((one for one, count in Counter(item.id for item in items).items() if count > 1), None)
    if twice is not None:
        raise QualityDataError(f"{args.data} has two items with the id {twice!r}; every item needs its own")
    said = json.dumps([[item.id, item.text, item.reference, item.options] for item in items])
    about = {"file": args.data.name, "items": len(items), "sha256": hashlib.sha256(said.encode()).hexdigest()}
    return Data(items, about | check(items), predictor)


def first_items(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` items, and what else belongs to the last one's unit, which counts as a whole or not at all."""
    if limit is None:
        return list(items)
    if limit < 1:
        raise QualityDataError(f"--limit is {limit}; give 1 or more, or leave it out")
    unit = items[min(limit, len(items)) - 1].unit
    rest = takewhile(lambda item: unit != "" and item.unit == unit, items[limit:])
    return [*items[:limit], *rest]


def check(items: Sequence[Item]) -> dict[str, str]:
    """Open every picture, so that a damaged one shows now and not after hours: {"images": a hash of all}."""
    seen, digest = set[Path](), hashlib.sha256()
    for item in items:
        try:
            item.text.encode()
            for path in item.images:
                if path not in seen:
                    seen.add(path)
                    load_image(path)
                    digest.update(sha256_of(path).encode())
        except QvlError as error:
            raise QualityDataError(f"item {item.id!r}: {error}") from None
        except UnicodeEncodeError as error:
            raise QualityDataError(f"item {item.id!r}: its text has half a character, {error}") from None
        if len(seen) % 1000 == 0 and item.images:
            say(f"{len(seen)} pictures looked at")
    return {"images": digest.hexdigest()} if seen else {}


def evaluate(
    args: argparse.Namespace, name: str, task: Task, data: Data, *, against: bool
) -> tuple[dict[str, Any], dict[str, Prediction]]:
    """Load the model that is called `name` and predict: (what the model is, its predictions)."""
    path = local_folder(name, progress=say)
    runtime = Runtime.from_pretrained(path, progress=say, **model_options(args, path, against=against))
    called = name_of(name)
    if against and called == name_of(args.path):
        called += "-against"
    about = {"name": called, **describe(path, runtime)}
    machine = describe_machine(runtime.plan.device)
    made = {name: machine[name] for name in ("device", "versions", "commit")}
    generation = dict(task.generation)
    header = {"task": task.name, "data": data.about, "model": about, "generation": generation, "made": made}
    lines = args.out / f"{task.name}.{called}.jsonl"
    return about, predict_all(data.predictor(runtime), data.items, lines, header, Progress(about["name"]))


def ask_judge(task: Task, items: Sequence[Item], scored: Scored, out: Path) -> None:
    """Write what a judge is to be asked, and say how."""
    assert task.requests is not None
    file = out / f"{task.name}.{scored.about['name']}.requests.jsonl"
    write_requests(file, task.requests(items, scored.predictions))
    verdicts = file.with_name(file.name.replace(".requests.", ".verdicts."))
    print(
        f"a judge scores the answers of {scored.about['name']}; next:\n"
        f"  python -m qvl_edge.evaluate.judge {file} {verdicts} --model NAME --judge URL"
    )


def run(args: argparse.Namespace) -> Path:
    """Evaluate as the arguments say: the path of the report's JSON."""
    task = TASKS[args.task]
    for name in filter(None, (args.path, args.against)):
        identity(local_folder(name, progress=say))  # a name that is wrong shows now
    data = open_data(args, task)
    items = data.items
    scored: list[Scored] = []
    for name in [args.path, args.against] if args.against else [args.path]:
        about, predictions = evaluate(args, name, task, data, against=bool(scored))
        scored.append(Scored.of(task, items, predictions, about))
    model, other = scored[0], scored[1] if len(scored) > 1 else None
    machine = describe_machine("cuda" if model.about["device"] == "cuda" else "cpu")
    report = reports.to_dict(task, items, model, other, data=data.about, **machine)
    if report["rows"]:
        print(reports.table(report, args.language))
    if task.requests:
        for one in scored:
            ask_judge(task, items, one, args.out)
    name = args.out / f"{task.name}.{name_of(args.path)}"
    page = name.with_name(name.name + ".html")
    with replacing(page) as partial:
        partial.write_text(reports.page(report, items, model, other, language=args.language), encoding="utf-8")
    result = name.with_name(name.name + ".json")
    write_json(result, report)
    print(f"\n{page}\n{result}")
    return result


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(arguments)
    try:
        run(args)
    except (QvlError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; what is done is kept in {args.out}, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
