"""One evaluation, from a task's file to its report: check the items, answer them with each model, score and compare."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from qvl_edge import Runtime
from qvl_edge.bundle import MANIFEST, is_bundle
from qvl_edge.config import Config
from qvl_edge.errors import QvlError
from qvl_edge.evaluate.perplexity import PERPLEXITY
from qvl_edge.evaluate.predict import Predictor, predict_all
from qvl_edge.evaluate.report import Scored, page, table, to_dict
from qvl_edge.evaluate.task import Item, QualityDataError, Task
from qvl_edge.files import replacing, sha256_of, write_json, write_jsonl
from qvl_edge.hub import local_folder
from qvl_edge.lora import open_checkpoint
from qvl_edge.machine import describe_machine
from qvl_edge.options import PROFILES
from qvl_edge.text.tokenizer import VOCAB_FILE, Tokenizer
from qvl_edge.vision.image import load_image
from qvl_edge.vit_cache import Progress

CONTEXT = 1024  # positions of an item's prompt and answer


@dataclass(frozen=True)
class Model:
    """A model on disk, its name in the report and in file names, and the options to load it with."""

    name: str
    folder: Path
    options: Mapping[str, Any]

    @classmethod
    def find(cls, given: str, options: Mapping[str, Any], *, beside: str = "", say: Progress) -> "Model":
        """A folder or a name on a hub. beside: the name of the model that it is compared with.

        options: of LoadOptions; what is not given does not depend on how much memory is free.
        """
        folder = local_folder(given, source=options.get("source", "hf"), revision=options.get("revision"), progress=say)
        options = {"max_context": CONTEXT, "profile": next(iter(PROFILES)), **options}
        if (profile := PROFILES.get(options["profile"])) is not None:
            options = {"head": profile.head, "kv_cache": profile.kv_cache, **options}
        if is_bundle(folder):
            options["profile"] = "auto"  # its vision tower is as it was exported
        identity(folder)  # a folder that is not a model is an error now
        name = Path(given).name or Path(given).resolve().name
        return cls(f"{name}-against" if name == beside else name, folder, options)

    @property
    def is_quantized(self) -> bool:
        """Whether its decoder is int4 or int8."""
        return Config.from_folder(self.folder).quantization is not None

    def with_lora(self, adapter: str) -> "Model":
        """The same model with an adapter merged into it; an error now if it cannot be."""
        folder = local_folder(adapter, source=self.options.get("source", "hf"))
        identity(self.folder, str(folder))
        return replace(self, name=f"{self.name}-{Path(adapter).name}", options={**self.options, "lora": str(folder)})


def identity(folder: Path, lora: str | None = None) -> str:
    """A hash that changes with a model's weights: of a bundle's manifest, or the fingerprint of a checkpoint."""
    if is_bundle(folder) and lora is None:
        return sha256_of(folder / MANIFEST)
    return open_checkpoint(folder, lora).fingerprint


def describe(folder: Path, runtime: Runtime, lora: str | None = None) -> dict[str, Any]:
    """Identity and precision of a loaded model."""
    plan, quant = runtime.plan, runtime.config.quantization
    return {
        "identity": identity(folder, lora),
        "decoder": "float" if quant is None else f"int{quant.bits}, groups of {quant.group_size}",
        "dtype": str(plan.dtype).removeprefix("torch."),
        "vision_tower": plan.vit,
        "head": plan.head,
        "kv_cache": plan.kv_cache,
        "activations": plan.activations,
        "device": plan.device,
        "batch": plan.slots,
        "max_context": plan.context,
    }


@dataclass(frozen=True)
class Data:
    """The items to answer, and what identifies them."""

    items: Sequence[Item]
    about: Mapping[str, Any]


def open_data(
    task: Task, file: Path, images: Path | None, *, limit: int | None, model: Model, seqlen: int, say: Progress
) -> Data:
    """Read a task's file; perplexity is read with the tokenizer of `model`, in passages of `seqlen` tokens.

    QualityDataError says what is wrong with the file.
    """
    if not file.exists():
        raise QualityDataError(f"{file} does not exist; docs/quality.md says what {task.name} needs")
    cut: dict[str, Any] = {}
    if task is PERPLEXITY:
        cut = {"tokenizer": Tokenizer.from_file(model.folder / VOCAB_FILE), "seqlen": seqlen}
    items = task.read(file, images, **cut)
    if not items:
        raise QualityDataError(f"{file} has no items; docs/quality.md has the format of {task.name}")
    items = first_items(items, limit)
    repeated = next((one for one, count in Counter(item.id for item in items).items() if count > 1), None)
    if repeated is not None:
        raise QualityDataError(f"{file} has two items with the id {repeated!r}; every item needs its own")
    asked = json.dumps([[item.id, item.text, item.reference, item.options] for item in items])
    about = {"file": file.name, "items": len(items), "sha256": hashlib.sha256(asked.encode()).hexdigest()}
    return Data(items, about | check(items, say))


def first_items(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` items, and the rest of the last one's unit, which counts as a whole or not at all."""
    if limit is None:
        return list(items)
    if limit < 1:
        raise QualityDataError(f"--limit is {limit}; give 1 or more, or leave it out")
    unit = items[min(limit, len(items)) - 1].unit
    rest = takewhile(lambda item: unit != "" and item.unit == unit, items[limit:])
    return [*items[:limit], *rest]


def check(items: Sequence[Item], say: Progress) -> dict[str, str]:
    """Open every image, so that a damaged one is an error now and not after hours: {"images": a hash of all}."""
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
            say(f"{len(seen)} images checked")
    return {"images": digest.hexdigest()} if seen else {}


def predict(task: Task, data: Data, model: Model, out: Path, *, say: Progress) -> Scored:
    """Load a model, answer the items that `out` has no predictions for, and score them."""
    runtime = Runtime.from_pretrained(model.folder, progress=say, **model.options)
    about = {"name": model.name, **describe(model.folder, runtime, model.options.get("lora"))}
    machine = describe_machine(runtime.plan.device)
    made = {name: machine[name] for name in ("device", "versions", "commit")}
    generation = dict(task.generation)
    header = {"task": task.name, "data": data.about, "model": about, "generation": generation, "made": made}
    path = out / f"{task.name}.{model.name}.jsonl"
    predictor = Predictor(runtime, chat_format=task.chat_format, generation=task.generation)
    predictions = predict_all(predictor, data.items, path, header)
    return Scored.of(task, data.items, predictions, about)


def evaluate(
    task: Task, data: Data, models: Sequence[Model], out: Path, *, language: str = "en", say: Progress
) -> Path:
    """Answer the items with one or two models, one in memory at a time, and write the report: the path of its JSON.

    Interrupted at any moment, the same call resumes and ends in the same report.
    """
    say(f"{task.title}: {len(data.items)} items")
    scored = [predict(task, data, model, out, say=say) for model in models]
    model, against = scored[0], scored[1] if len(scored) > 1 else None
    machine = describe_machine("cuda" if model.about["device"] == "cuda" else "cpu")
    report = to_dict(task, data.items, model, against, data=data.about, **machine)
    if report["rows"]:
        print(table(report, language))
    if task.requests:
        for one in scored:
            requests = out / f"{task.name}.{one.about['name']}.requests.jsonl"
            write_jsonl(requests, task.requests(data.items, one.predictions))
            verdicts = requests.with_name(requests.name.replace(".requests.", ".verdicts."))
            print(
                f"a judge scores the answers of {one.about['name']}; next:\n"
                f"  qvl-edge judge {requests} {verdicts} --model NAME --judge URL"
            )
    name = f"{task.name}.{models[0].name}"
    html, result = out / f"{name}.html", out / f"{name}.json"
    with replacing(html) as partial:
        partial.write_text(page(report, data.items, model, against, language=language), encoding="utf-8")
    write_json(result, report)
    print(f"\n{html}\n{result}")
    return result
