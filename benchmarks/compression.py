"""What each compression costs the small model, alone and together: python -m benchmarks.compression --out DIR

On the synthetic suite (qvl_edge.evaluate.synthetic): the share of right answers, and KL(float32 || variant) of the next
token in nats per token, along the reference answers about every third scene. The divergence still discriminates where
nearly all answers are right. A stopped run resumes. Writes compression.json and compression.svg.
"""

import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import plot
from benchmarks.report import command, exits_with_its_message
from export.part import export_vit
from quantize.job import quantize_checkpoint
from quantize.solver import FULL, PLAIN, Method
from qvl_edge import Runtime
from qvl_edge.bundle import MANIFEST, Bundle
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import QuantConfig
from qvl_edge.demo import SMALL_MODEL
from qvl_edge.demo.scenes import KINDS, UNSEEN, write_conversations
from qvl_edge.engine.request import SYSTEM, Request
from qvl_edge.evaluate.evaluation import describe
from qvl_edge.evaluate.intervals import difference_of, mean_of
from qvl_edge.evaluate.predict import Predictor, content_of, predict_all
from qvl_edge.evaluate.report import Scored, rows
from qvl_edge.evaluate.synthetic import FILE, SYNTHETIC, write_scenes
from qvl_edge.evaluate.task import Item
from qvl_edge.files import read_jsonl, replacing, write_json, write_jsonl
from qvl_edge.machine import commit, describe_machine
from qvl_edge.markdown import table
from qvl_edge.plot import optional
from qvl_edge.text.conversations import read_samples
from qvl_edge.text.prompt import chat_prompt
from qvl_edge.text.tokenizer import Tokenizer

CALIBRATION_SCENES = 128
BATCH = 16
FLOAT, DEFAULT = "float32", "int4, groups of 128"


@dataclass(frozen=True)
class Variant:
    """One way to compress the model."""

    name: str
    decoder: QuantConfig | None = None  # float if None
    calibrated: bool = True
    method: Method = FULL
    vit: str = "float16"  # exact, because the checkpoint is float16
    head: str = "float16"
    kv_cache: str = "float16"
    activations: str = "float"


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
    Variant("int4, int8 activations", GPTQ, activations="int8"),
    Variant("8g: int4, int8 tower, head, cache", GPTQ, vit="int8", head="int8", kv_cache="int8"),
    Variant("8g, int8 activations", GPTQ, vit="int8", head="int8", kv_cache="int8", activations="int8"),
    Variant("6g: int4, int4 tower, int8 head, cache", GPTQ, vit="int4", head="int8", kv_cache="int8"),
)


class VariantBuilder:
    """Builds the variants of a checkpoint in `folder`, unless they are there."""

    def __init__(self, checkpoint: Checkpoint, folder: Path):
        self.checkpoint, self.folder = checkpoint, folder

    def runtime(self, variant: Variant) -> Runtime:
        profile = {"float16": "12g", "int8": "8g", "int4": "6g"}[variant.vit]
        return Runtime.from_pretrained(
            self.path(variant),
            device="cpu",
            profile=profile,  # type: ignore[arg-type]
            head=variant.head,  # type: ignore[arg-type]
            kv_cache=variant.kv_cache,  # type: ignore[arg-type]
            activations=variant.activations,  # type: ignore[arg-type]
            slots=BATCH,
            max_context=1024,
            cache_dir=self.folder / "towers",
        )

    def size(self, variant: Variant) -> int | None:
        """Bytes on disk of the variant's bundle, or for FLOAT of the checkpoint; None if it has neither."""
        if variant.decoder is None:
            whole = sum(self.checkpoint[name].nbytes for name in self.checkpoint.names)
            return whole if variant.name == FLOAT else None
        parts = Bundle.open(self.path(variant)).parts
        return sum(file["bytes"] for part in parts.values() for file in part["files"].values())

    def path(self, variant: Variant) -> Path:
        """Of the variant's bundle, which is built if it is not there; of the checkpoint if nothing is quantized."""
        quant = variant.decoder
        if quant is None:
            return self.checkpoint.path
        words = {"desc_act": quant.desc_act, "rounded": not variant.calibrated, "plain": variant.method != FULL}
        decoder = self.folder / "-".join([f"g{quant.group_size}", *(word for word, holds in words.items() if holds)])
        if not (decoder / MANIFEST).exists():
            samples = self._samples() if variant.calibrated else None
            quantize_checkpoint(self.checkpoint, decoder, quant, samples, method=variant.method)
        bundle = decoder.with_name(f"{decoder.name}-{variant.vit}")
        if not bundle.exists():
            partial = bundle.with_name(f"{bundle.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(decoder, partial)
            export_vit(self.checkpoint, partial, dtype=variant.vit)
            partial.rename(bundle)
        return bundle

    def _samples(self) -> Any:
        tokenizer = Tokenizer.from_folder(self.checkpoint.path, self.checkpoint.config)
        path = self.folder / "calibration" / "conversations.json"
        if not path.exists():
            write_conversations(path.parent, UNSEEN, CALIBRATION_SCENES)
        return read_samples(path, tokenizer, samples=CALIBRATION_SCENES, seqlen=2048, seed=0)


class Divergence:
    """KL(float32 || variant) along the reference answers; float32's log-probabilities (T, vocab) are kept in a file."""

    def __init__(self, items: Sequence[Item], folder: Path):
        self.items = [item for item in items if int(item.id.partition("-")[0]) % 3 == 0]
        self.folder, self.reference = folder, folder / f"{FLOAT}.logprobs"

    def measure(self, name: str, runtime: Runtime) -> list[dict[str, Any]]:
        """Per item: id, tokens, the sums of KL and of -log p, and how often the top token is float32's.

        Saved when complete, and then read from the file. FLOAT must come first.
        """
        path = self.folder / f"{name}.divergence.jsonl"
        if path.exists():
            return [line for _, line in read_jsonl(path)]
        runtime.forget()
        if name == FLOAT:
            with replacing(self.reference) as partial, partial.open("wb") as file:
                for item in self.items:
                    file.write(self._logprobs(runtime, item).numpy().tobytes())
        exact_answers = np.memmap(self.reference, np.float32, mode="r").reshape(-1, runtime.config.vocab_size)
        lines, start = [], 0
        for item in self.items:
            ids = torch.tensor(runtime.tokenizer.encode(item.reference["answer"]))
            exact = torch.from_numpy(exact_answers[start : start + len(ids)].copy())
            mine = exact if name == FLOAT else self._logprobs(runtime, item)
            start += len(ids)
            kl = float((exact.exp() * (exact - mine)).sum(dtype=torch.float64))
            nll = -float(mine[torch.arange(len(ids)), ids].sum(dtype=torch.float64))
            same = int((mine.argmax(1) == exact.argmax(1)).sum())
            lines.append({"id": item.id, "tokens": len(ids), "kl": kl, "nll": nll, "same": same})
        write_jsonl(path, lines)
        return lines

    def _logprobs(self, runtime: Runtime, item: Item) -> torch.Tensor:
        """(T, vocab) float32, at the tokens of the reference answer."""
        options: dict[str, Any] = {"max_window_size": runtime.max_window_size, "markup_images": False}
        prompt = chat_prompt(runtime.tokenizer, content_of(item), [], SYSTEM, **options)
        ids, start = runtime.tokenizer.encode(item.reference["answer"]), len(prompt.ids)
        found: list[torch.Tensor] = []
        request = Request(
            prompt=replace(prompt, ids=[*prompt.ids, *ids]),
            scored=[(start, start + len(ids))],
            alpha_length=start,
            on_logits=lambda logits: found.append(logits.log_softmax(-1)),
        )
        runtime.engine.complete(runtime.prepare(request))
        return torch.cat(found)


def by_scene(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(values per token, tokens), both by scene, because the questions about a scene are not independent."""
    totals, tokens = defaultdict[str, float](float), Counter[str]()
    for line in lines:
        scene = line["id"].partition("-")[0]
        totals[scene] += line[key]
        tokens[scene] += line["tokens"]
    return [totals[scene] / tokens[scene] for scene in tokens], list(tokens.values())


def measure(
    variants: Sequence[Variant], builder: VariantBuilder, items: Sequence[Item], out: Path
) -> list[dict[str, Any]]:
    """A row per variant, compared with the first one, FLOAT."""
    divergence = Divergence(items, out)
    found: list[dict[str, Any]] = []
    divergences: dict[str, list[float]] = {}
    exact: Scored | None = None
    for variant in variants:
        label = "".join(c if c.isalnum() else "-" for c in variant.name)
        runtime = builder.runtime(variant)
        predictor = Predictor(runtime, chat_format=SYNTHETIC.chat_format, generation=SYNTHETIC.generation)
        header = {"variant": variant.name, "model": describe(builder.path(variant), runtime)}
        predictions = predict_all(predictor, items, out / f"{label}.jsonl", header)
        scored = Scored.of(SYNTHETIC, items, predictions, {"name": variant.name})
        lines = divergence.measure(label, runtime)
        divergences[variant.name], tokens = by_scene(lines, "kl")
        total = sum(line["tokens"] for line in lines)
        exact = exact or scored
        found.append(
            {
                "variant": variant.name,
                "bytes": builder.size(variant),
                "rows": rows(scored, exact),
                "answers_changed": sum(predictions[item.id].text != exact.predictions[item.id].text for item in items),
                "kl": vars(mean_of(divergences[variant.name], tokens)),
                "same_token": sum(line["same"] for line in lines) / total,
                "perplexity": math.exp(sum(line["nll"] for line in lines) / total),
                "scored_tokens": total,
            }
        )
    if DEFAULT in divergences:  # the difference in divergence from the default, on the same scenes
        for row in found:
            difference = difference_of(divergences[DEFAULT], divergences[row["variant"]], tokens)
            row["kl_over_default"] = vars(difference.mean)
    return found


def summary(found: Sequence[Mapping[str, Any]]) -> str:
    """As markdown: right answers in percent, differences from float32 in percentage points."""
    head = ["", "MB", "right", "difference", *KINDS, "changed", "KL, 1e-4 nats per token", "over the default"]
    lines = []
    for entry in found:
        rights = {row["group"]: row for row in entry["rows"] if row["metric"] == "right"}
        whole, difference = rights[None], rights[None]["difference"]["mean"]
        over = entry.get("kl_over_default")
        lines.append(
            [
                entry["variant"],
                "" if entry["bytes"] is None else f"{entry['bytes'] / 1e6:.2f}",
                f"{whole['model']['value']:.2f}",
                "" if entry["variant"] == FLOAT else _interval(difference, 1, "+"),
                *(f"{rights[kind]['model']['value']:.1f}" if kind in rights else "" for kind in KINDS),
                entry["answers_changed"],
                _interval(entry["kl"], 1e4),
                "" if over is None or entry["variant"] in (FLOAT, DEFAULT) else _interval(over, 1e4, "+"),
            ]
        )
    return table(head, lines)


def _interval(estimate: Mapping[str, float], factor: float, sign: str = "") -> str:
    value, low, high = (estimate[name] * factor for name in ("value", "low", "high"))
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


@exits_with_its_message("benchmarks.compression")
def main(arguments: list[str] | None = None) -> None:
    parser = command("compression", __doc__)
    parser.add_argument("--checkpoint", type=Path, default=SMALL_MODEL, help="default: the small model that ships")
    parser.add_argument("--scenes", type=int, default=1000, help="default: 1000")
    parser.add_argument(
        "--only", metavar="TEXT", help="only float32, the default, and variants whose name contains TEXT"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("compression"), metavar="DIR", help="for results and intermediate files"
    )
    args = parser.parse_args(arguments)
    chosen = [one for one in VARIANTS if not args.only or one.name in (FLOAT, DEFAULT) or args.only in one.name]
    if args.scenes < 4:
        parser.error(f"--scenes is {args.scenes}; every third scene is scored, so an interval needs 4 or more")
    data = args.out / f"scenes-{args.scenes}"
    if not (data / FILE).exists():
        write_scenes(data, args.scenes)
    items = SYNTHETIC.read(data / FILE, None)
    checkpoint = Checkpoint(args.checkpoint)
    made_by = f"{checkpoint.fingerprint[:12]}-{commit()}"
    work = args.out / f"{made_by}-{args.scenes}"
    work.mkdir(parents=True, exist_ok=True)
    found = measure(chosen, VariantBuilder(checkpoint, args.out / made_by), items, work)
    counts = {"scenes": args.scenes, "questions": len(items)}
    result = {"benchmark": "compression", **counts, **describe_machine(), "variants": found}
    print(summary(found))
    write_json(args.out / "compression.json", result)
    with optional():
        plot.draw(result, args.out / "compression.svg")


if __name__ == "__main__":
    main()
