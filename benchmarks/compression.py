"""What each compression costs the small model, alone and together: python -m benchmarks.compression --out DIR

Over the synthetic suite (qvl_edge.evaluate.synthetic): the share of right answers, and how far the next token's
distribution is from float32's, KL(float32 || variant) in nats a token, along the exact answers about every third scene.
Rights and wrongs are coarse where a model is nearly always right; the divergence sees what they do not. Stopped at any
moment, the same command goes on. Writes compression.json and compression.svg.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qvl_edge.demo
from benchmarks.plot import text
from export.part import export_vit
from quantize.job import quantize_checkpoint
from quantize.solver import FULL, PLAIN, Method
from qvl_edge import Runtime
from qvl_edge.bundle import MANIFEST, Bundle
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import QuantConfig
from qvl_edge.demo.conversations import write_conversations
from qvl_edge.demo.scenes import KINDS, UNSEEN
from qvl_edge.engine.request import SYSTEM, Request
from qvl_edge.evaluate.evaluation import describe
from qvl_edge.evaluate.intervals import difference_of, mean_of
from qvl_edge.evaluate.predict import Predictor, content_of, predict_all
from qvl_edge.evaluate.report import Scored, rows
from qvl_edge.evaluate.synthetic import FILE, SYNTHETIC, write_scenes
from qvl_edge.evaluate.task import Item
from qvl_edge.files import read_jsonl, replacing, write_json
from qvl_edge.machine import commit, describe_machine, ends_with_its_message
from qvl_edge.text.conversations import read_samples
from qvl_edge.text.prompt import chat_prompt
from qvl_edge.text.tokenizer import VOCAB_FILE, Tokenizer

CHECKPOINT = Path(qvl_edge.demo.__file__).parent / "checkpoint"
CALIBRATION_SCENES = 128
BATCH = 16
FLOAT, DEFAULT = "float32", "int4, groups of 128"


@dataclass(frozen=True)
class Variant:
    """One way to keep the model. decoder: float if None. A float16 tower loses nothing: so is the checkpoint."""

    name: str
    decoder: QuantConfig | None = None
    calibrated: bool = True
    method: Method = FULL
    vit: str = "float16"
    head: str = "float16"
    kv_cache: str = "float16"


GPTQ = QuantConfig()  # the defaults of quantize.gptq
VARIANTS = (
    Variant(FLOAT),
    Variant("int4, groups of 32", QuantConfig(group_size=32)),
    Variant("int4, groups of 64", QuantConfig(group_size=64)),
    Variant(DEFAULT, GPTQ),
    Variant("int4, desc_act", QuantConfig(desc_act=True)),
    Variant("int4, GPTQ as published", GPTQ, method=PLAIN),
    Variant("int4, rounded to nearest", GPTQ, calibrated=False),
    Variant("int8 head", head="int8"),
    Variant("int8 cache", kv_cache="int8"),
    Variant("int8 tower", vit="int8"),
    Variant("int4 tower", vit="int4"),
    Variant("8g: int4, int8 tower, head, cache", GPTQ, vit="int8", head="int8", kv_cache="int8"),
    Variant("6g: int4, int4 tower, int8 head, cache", GPTQ, vit="int4", head="int8", kv_cache="int8"),
)


class Workshop:
    """Makes the models in `folder`, each once."""

    def __init__(self, checkpoint: Checkpoint, folder: Path):
        self.checkpoint, self.folder = checkpoint, folder

    def runtime(self, variant: Variant) -> Runtime:
        """A loaded model."""
        profile = {"float16": "12g", "int8": "8g", "int4": "6g"}[variant.vit]
        return Runtime.from_pretrained(
            self.path(variant),
            device="cpu",
            profile=profile,
            head=variant.head,  # type: ignore[arg-type]
            kv_cache=variant.kv_cache,  # type: ignore[arg-type]
            slots=BATCH,
            max_context=1024,
            cache_dir=self.folder / "towers",
        )

    def path(self, variant: Variant) -> Path:
        """The checkpoint, or a bundle of it."""
        return self.checkpoint.path if variant.decoder is None else self._bundle(variant)

    def size(self, variant: Variant) -> int | None:
        """Bytes on disk of a bundle of it; of the float model those of the checkpoint, and nothing where only a part of
        it is kept otherwise, of which there is no bundle."""
        if variant.decoder is None:
            whole = sum(self.checkpoint[name].nbytes for name in self.checkpoint.names)
            return whole if variant.name == FLOAT else None
        parts = Bundle.open(self._bundle(variant)).parts
        return sum(file["bytes"] for part in parts.values() for file in part["files"].values())

    def _bundle(self, variant: Variant) -> Path:
        quant = variant.decoder
        assert quant is not None
        marks = [f"g{quant.group_size}", *(["desc_act"] if quant.desc_act else [])]
        marks += [*([] if variant.calibrated else ["rounded"]), *([] if variant.method == FULL else ["plain"])]
        decoder = self.folder / "-".join(marks)
        if not (decoder / MANIFEST).exists():
            samples = self._samples() if variant.calibrated else None
            quantize_checkpoint(self.checkpoint, decoder, quant, samples, method=variant.method)
        bundle = decoder.with_name(f"{decoder.name}-{variant.vit}")
        if not bundle.exists():
            making = bundle.with_name(f"{bundle.name}.making")
            shutil.rmtree(making, ignore_errors=True)
            shutil.copytree(decoder, making)
            export_vit(self.checkpoint, making, dtype=variant.vit)
            making.rename(bundle)
        return bundle

    def _samples(self) -> Any:
        tokenizer = Tokenizer.from_file(self.checkpoint.path / VOCAB_FILE)
        path = self.folder / "calibration" / "conversations.json"
        if not path.exists():
            write_conversations(path.parent, UNSEEN, CALIBRATION_SCENES)
        return read_samples(path, tokenizer, samples=CALIBRATION_SCENES, seqlen=2048, seed=0)


class Divergence:
    """KL(float32 || variant) along the exact answers; float32's log-probabilities lie in a file (T, vocab) float32."""

    def __init__(self, items: Sequence[Item], folder: Path):
        self.items = [item for item in items if int(item.id.partition("-")[0]) % 3 == 0]
        self.folder = folder

    def measure(self, name: str, runtime: Runtime) -> list[dict[str, Any]]:
        """A line an item: its id, tokens, the sums of KL and of -log p, and how often the likeliest token is float32's.

        A finished list is kept; an unfinished one starts again.
        """
        path = self.folder / f"{name}.divergence.jsonl"
        if path.exists():
            return [line for _, line in read_jsonl(path)]
        reference = self.folder / "float32.logprobs"
        lines, at = [], 0
        runtime.forget()
        with replacing(reference if name == FLOAT else path) as partial:
            partial.touch()
            file = partial.open("wb") if name == FLOAT else None
            for item in self.items:
                mine = self._logprobs(runtime, item)
                if file is not None:
                    file.write(mine.numpy().tobytes())
                    exact = mine
                else:
                    exact = self._read(reference, at, *mine.shape)
                ids = runtime.tokenizer.encode(item.reference["answer"])
                at += len(ids)
                lines.append(
                    {
                        "id": item.id,
                        "tokens": len(ids),
                        "kl": float((exact.exp() * (exact - mine)).sum(dtype=torch.float64)),
                        "nll": -float(mine[torch.arange(len(ids)), torch.tensor(ids)].sum(dtype=torch.float64)),
                        "same": int((mine.argmax(1) == exact.argmax(1)).sum()),
                    }
                )
            written = "".join(json.dumps(line) + "\n" for line in lines)
            if file is not None:
                file.close()
            else:
                partial.write_text(written)
        if name == FLOAT:
            with replacing(path) as partial:
                partial.write_text(written)
        return lines

    def _logprobs(self, runtime: Runtime, item: Item) -> torch.Tensor:
        limits: dict[str, Any] = {"max_window_size": runtime.max_window_size, "markup_images": False}
        prompt = chat_prompt(runtime.tokenizer, content_of(item), (), SYSTEM, **limits)
        start, ids = len(prompt.ids), runtime.tokenizer.encode(item.reference["answer"])
        request = Request(prompt=replace(prompt, ids=[*prompt.ids, *ids]), scored=[(start, start + len(ids))])
        request.alpha_length, parts = start, list[torch.Tensor]()
        request.on_logits = parts.append
        runtime.engine.complete(runtime.prepare(request))
        return torch.cat(parts).log_softmax(-1)

    def _read(self, path: Path, at: int, tokens: int, vocab: int) -> torch.Tensor:
        whole = np.memmap(path, dtype=np.float32, mode="r").reshape(-1, vocab)
        return torch.from_numpy(whole[at : at + tokens].copy())


def by_scene(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(value a token, tokens) of every scene: its questions are not independent of one another."""
    sums: dict[str, list[float]] = {}
    for line in lines:
        entry = sums.setdefault(line["id"].partition("-")[0], [0.0, 0.0])
        entry[0] += line[key]
        entry[1] += line["tokens"]
    return [total / tokens for total, tokens in sums.values()], [tokens for _, tokens in sums.values()]


def measure(variants: Sequence[Variant], workshop: Workshop, items: Sequence[Item], out: Path) -> list[dict[str, Any]]:
    """A row a variant; the first one, FLOAT, is what the others are compared with."""
    divergence = Divergence(items, out)
    found: list[dict[str, Any]] = []
    divergences: dict[str, list[float]] = {}
    exact: Scored | None = None
    for variant in variants:
        label = "".join(c if c.isalnum() else "-" for c in variant.name)
        runtime = workshop.runtime(variant)
        predictor = Predictor(runtime, chat_format=SYNTHETIC.chat_format, generation=SYNTHETIC.generation)

        def tick(done: int, total: int, name: str = variant.name) -> None:
            if done % 512 < 64 or done == total:
                print(f"{name}: {done} of {total} questions", file=sys.stderr, flush=True)

        header = {"variant": variant.name, "model": describe(workshop.path(variant), runtime)}
        predictions = predict_all(predictor, items, out / f"{label}.jsonl", header, tick)
        scored = Scored.of(SYNTHETIC, items, predictions, {"name": variant.name})
        lines = divergence.measure(label, runtime)
        divergences[variant.name], tokens = by_scene(lines, "kl")
        total = sum(line["tokens"] for line in lines)
        exact = exact or scored
        found.append(
            {
                "variant": variant.name,
                "bytes": workshop.size(variant),
                "rows": rows(scored, exact),
                "answers_changed": sum(predictions[item.id].text != exact.predictions[item.id].text for item in items),
                "kl": vars(mean_of(divergences[variant.name], tokens)),
                "same_token": sum(line["same"] for line in lines) / total,
                "perplexity": math.exp(sum(line["nll"] for line in lines) / total),
                "scored_tokens": total,
            }
        )
    for row in found:  # on the same scenes: what this one diverges more than the default
        if DEFAULT in divergences:
            difference = difference_of(divergences[DEFAULT], divergences[row["variant"]], tokens)
            row["kl_over_default"] = vars(difference.mean)
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows as markdown: shares of right answers in percent, differences from float32 in points."""
    head = ["", "MB", "right", "difference", *KINDS, "changed", "KL, 1e-4 nats a token", "over the default"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for entry in found:
        rights = {row["group"]: row for row in entry["rows"] if row["metric"] == "right"}
        whole, difference = rights[None], rights[None]["difference"]["mean"]
        over = entry.get("kl_over_default")
        cells = [
            entry["variant"],
            "" if entry["bytes"] is None else f"{entry['bytes'] / 1e6:.2f}",
            f"{whole['model']['value']:.2f}",
            "" if entry["variant"] == FLOAT else _interval(difference, 1, "+"),
            *(f"{rights[kind]['model']['value']:.1f}" if kind in rights else "" for kind in KINDS),
            str(entry["answers_changed"]),
            _interval(entry["kl"], 1e4),
            "" if over is None or entry["variant"] in (FLOAT, DEFAULT) else _interval(over, 1e4, "+"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(estimate: Mapping[str, float], factor: float, sign: str = "") -> str:
    value, low, high = (estimate[name] * factor for name in ("value", "low", "high"))
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


LEFT, PANEL, GAP, LINE, TOP = 270, 330, 50, 24, 60  # pixels of the picture


def picture(result: Mapping[str, Any]) -> str:
    """SVG: for every variant the difference of right answers and the divergence, each with its 95 % interval."""
    found = [row for row in result["variants"] if row["variant"] != FLOAT]
    height = TOP + LINE * len(found) + 70
    panels = (
        (
            "Right answers, difference from float32 in points",
            [
                next(row for row in entry["rows"] if (row["metric"], row["group"]) == ("right", None))["difference"][
                    "mean"
                ]
                for entry in found
            ],
            False,
        ),
        ("Divergence from float32, nats a token", [entry["kl"] for entry in found], True),
    )
    parts = [text(LEFT - 10, TOP + LINE * (i + 0.7), e["variant"], anchor="end") for i, e in enumerate(found)]
    for index, (title, estimates, logarithmic) in enumerate(panels):
        parts += _panel(LEFT + index * (PANEL + GAP), title, estimates, logarithmic)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    about = (
        f"{result['scenes']} scenes, {result['questions']} questions; {result['device']}, {versions}, {result['date']}"
    )
    parts.append(
        text(10, height - 10, f"{about}, commit {result['commit']}. Lines are 95 % intervals.", anchor="start")
    )
    width = LEFT + 2 * PANEL + GAP + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(left: int, title: str, estimates: Sequence[Mapping[str, float]], logarithmic: bool) -> list[str]:
    height = LINE * len(estimates)
    edges = [value for estimate in estimates for value in (estimate["low"], estimate["high"])]
    if logarithmic:
        smallest = min(estimate["value"] for estimate in estimates) / 3
        ticks = [
            10.0**power for power in range(math.floor(math.log10(smallest)), math.ceil(math.log10(max(edges))) + 1)
        ]
        low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    else:
        reach = max(0.5, math.ceil(max(abs(edge) for edge in edges) * 2) / 2)
        ticks = [-reach, -reach / 2, 0.0, reach / 2, reach]
        low, high = -reach, reach

    def x(value: float) -> float:
        value = math.log10(max(value, ticks[0])) if logarithmic else value
        return left + PANEL * (value - low) / (high - low)

    parts = [text(left + PANEL / 2, TOP - 34, title, size=13)]
    for tick in ticks:
        strong = tick == 0
        parts.append(f'<path d="M{x(tick):.1f} {TOP}v{height}" stroke="{"#888" if strong else "#e4e4e4"}"/>')
        parts.append(text(x(tick), TOP - 8, f"{tick:g}"))
    for index, estimate in enumerate(estimates):
        y = TOP + LINE * (index + 0.5)
        parts.append(
            f'<path d="M{x(estimate["low"]):.1f} {y}H{x(estimate["high"]):.1f}" stroke="#1b6ca8" stroke-width="2"/>'
        )
        parts.append(f'<circle cx="{x(estimate["value"]):.1f}" cy="{y}" r="4" fill="#1b6ca8"/>')
    return parts


@ends_with_its_message("benchmarks.compression")
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="the small model (the one that ships)")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--only", metavar="TEXT", help="float32, the default, and variants whose name has this in it")
    parser.add_argument("--out", type=Path, default=Path("compression"), metavar="DIR", help="work, and the results")
    args = parser.parse_args(arguments)
    chosen = [one for one in VARIANTS if not args.only or one.name in (FLOAT, DEFAULT) or args.only in one.name]
    if args.scenes < 4:
        parser.error(f"--scenes is {args.scenes}; every third scene is scored, and an interval takes 4 or more")
    data = args.out / f"scenes-{args.scenes}"
    if not (data / FILE).exists():
        write_scenes(data, args.scenes)
    items = SYNTHETIC.read(data / FILE, None)
    checkpoint = Checkpoint(args.checkpoint)
    mark = f"{checkpoint.fingerprint[:12]}-{commit()}"
    work = args.out / f"{mark}-{args.scenes}"  # what this code made of it
    work.mkdir(parents=True, exist_ok=True)
    found = measure(chosen, Workshop(checkpoint, args.out / mark), items, work)
    result = {
        "benchmark": "compression",
        "scenes": args.scenes,
        "questions": len(items),
        **describe_machine(),
        "variants": found,
    }
    print(table(found))
    write_json(args.out / "compression.json", result)
    (args.out / "compression.svg").write_text(picture(result), encoding="utf-8")


if __name__ == "__main__":
    main()
