"""What each compression costs the small model, alone and together: python -m benchmarks.compression --out DIR

Over the synthetic suite (qvl_edge.evaluate.synthetic): the share of right answers, and how far the next token's
distribution is from float32's, KL(float32 || variant) in nats per token, along the exact answers about every third
scene. Accuracy is coarse where a model is nearly always right; the divergence is not. A stopped run resumes. Writes
compression.json and compression.svg.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qvl_edge.demo
from benchmarks import plot
from benchmarks.report import command, exits_with_its_message, say, table
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
from qvl_edge.machine import commit, describe_machine
from qvl_edge.plot import optional
from qvl_edge.text.conversations import read_samples
from qvl_edge.text.prompt import chat_prompt
from qvl_edge.text.tokenizer import VOCAB_FILE, Tokenizer

CHECKPOINT = Path(qvl_edge.demo.__file__).parent / "checkpoint"
CALIBRATION_SCENES = 128
BATCH = 16
FLOAT, DEFAULT = "float32", "int4, groups of 128"


@dataclass(frozen=True)
class Variant:
    """One way to compress the model. decoder: float if None. A float16 tower loses nothing: so is the checkpoint."""

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


class VariantBuilder:
    """Builds the variants of a checkpoint in `folder`, each once."""

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
        """Bytes on disk of the variant's bundle, of FLOAT those of the checkpoint; None where there is no bundle."""
        if variant.decoder is None:
            whole = sum(self.checkpoint[name].nbytes for name in self.checkpoint.names)
            return whole if variant.name == FLOAT else None
        parts = Bundle.open(self._bundle(variant)).parts
        return sum(file["bytes"] for part in parts.values() for file in part["files"].values())

    def _bundle(self, variant: Variant) -> Path:
        quant = variant.decoder
        assert quant is not None
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
        tokenizer = Tokenizer.from_file(self.checkpoint.path / VOCAB_FILE)
        path = self.folder / "calibration" / "conversations.json"
        if not path.exists():
            write_conversations(path.parent, UNSEEN, CALIBRATION_SCENES)
        return read_samples(path, tokenizer, samples=CALIBRATION_SCENES, seqlen=2048, seed=0)


class Divergence:
    """KL(float32 || variant) along the exact answers; float32's log-probabilities (T, vocab) float32 are in a file."""

    def __init__(self, items: Sequence[Item], folder: Path):
        self.items = [item for item in items if int(item.id.partition("-")[0]) % 3 == 0]
        self.folder, self.reference = folder, folder / f"{FLOAT}.logprobs"

    def measure(self, name: str, runtime: Runtime) -> list[dict[str, Any]]:
        """A line per item: its id, tokens, the sums of KL and of -log p, and how often the top token is float32's.

        A finished list is kept, an unfinished one starts again. FLOAT comes first.
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
            lines.append(
                {
                    "id": item.id,
                    "tokens": len(ids),
                    "kl": float((exact.exp() * (exact - mine)).sum(dtype=torch.float64)),
                    "nll": -float(mine[torch.arange(len(ids)), ids].sum(dtype=torch.float64)),
                    "same": int((mine.argmax(1) == exact.argmax(1)).sum()),
                }
            )
        with replacing(path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return lines

    def _logprobs(self, runtime: Runtime, item: Item) -> torch.Tensor:
        """(T, vocab) float32 of the tokens of the exact answer."""
        options = {"max_window_size": runtime.max_window_size, "markup_images": False}
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
    """(value per token, tokens) of every scene, whose questions are not independent of one another."""
    sums: dict[str, list[float]] = {}
    for line in lines:
        entry = sums.setdefault(line["id"].partition("-")[0], [0.0, 0.0])
        entry[0] += line[key]
        entry[1] += line["tokens"]
    return [total / tokens for total, tokens in sums.values()], [tokens for _, tokens in sums.values()]


def measure(
    variants: Sequence[Variant], builder: VariantBuilder, items: Sequence[Item], out: Path
) -> list[dict[str, Any]]:
    """A row per variant; the first one, FLOAT, is what the others are compared with."""
    divergence = Divergence(items, out)
    found: list[dict[str, Any]] = []
    divergences: dict[str, list[float]] = {}
    exact: Scored | None = None
    for variant in variants:
        label = "".join(c if c.isalnum() else "-" for c in variant.name)
        runtime = builder.runtime(variant)
        predictor = Predictor(runtime, chat_format=SYNTHETIC.chat_format, generation=SYNTHETIC.generation)

        def tick(done: int, total: int, name: str = variant.name) -> None:
            if done % 512 < 64 or done == total:
                say(f"{name}: {done} of {total} questions")

        header = {"variant": variant.name, "model": describe(builder.path(variant), runtime)}
        predictions = predict_all(predictor, items, out / f"{label}.jsonl", header, tick)
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
    for row in found:  # by how much it diverges more than the default, on the same scenes
        if DEFAULT in divergences:
            difference = difference_of(divergences[DEFAULT], divergences[row["variant"]], tokens)
            row["kl_over_default"] = vars(difference.mean)
    return found


def summary(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows as markdown: shares of right answers in percent, differences from float32 in points."""
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
    """The command."""
    parser = command("compression", __doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="the small model (default: the one here)")
    parser.add_argument("--scenes", type=int, default=1000, help="default: 1000")
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
