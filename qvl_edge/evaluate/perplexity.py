"""How surprised a model is by a text, or by the answers in conversations about pictures.

A text is cut into windows of `seqlen` tokens that share nothing, as GPTQ's authors measure WikiText-2
(arXiv:2210.17323): all tokens of a window but the first count, and a shorter rest is left out. Of a conversation in
Qwen-VL's fine-tuning format the assistant's words count, and the <|im_end|> after them. Losses come passage by
passage, so that two models can be compared passage by passage.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from qvl_edge import Runtime
from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.engine.inputs import Inputs
from qvl_edge.engine.sampling import Sampler, check_logits
from qvl_edge.engine.slots import CHUNK
from qvl_edge.evaluate.task import QualityDataError
from qvl_edge.runtime import SCORED
from qvl_edge.text.conversations import Sample, read_samples
from qvl_edge.text.tokenizer import IM_END, IM_START, Tokenizer
from qvl_edge.vision.image import load_image


@dataclass(frozen=True)
class Passage:
    """Tokens that go through the model together; those of `spans`, each a first index and an end, count."""

    id: str  # unique in its file
    sample: Sample
    spans: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Loss:
    """What a passage cost: the sum of -log p (natural) over its tokens that count, and how many they are."""

    id: str
    nll: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; Loss(**values) reads them back."""
        return asdict(self)


def read_passages(
    file: Path, tokenizer: Tokenizer, *, seqlen: int = 2048, samples: int | None = None, seed: int = 0
) -> list[Passage]:
    """The windows of a .txt file, or the entries of a .json or .jsonl file (text/conversations.py), cut at `seqlen`.

    Of more than `samples` a subset chosen by `seed`. QualityDataError or CalibrationError say what cannot be used.
    """
    if file.suffix == ".txt":
        passages = _windows(file, tokenizer, seqlen)
        chosen = random.Random(seed).sample(range(len(passages)), min(samples or len(passages), len(passages)))
        return [passages[index] for index in sorted(chosen)]
    made = read_samples(file, tokenizer, samples=samples or 1 << 62, seqlen=seqlen, seed=seed)
    passages = [Passage(one.where.removeprefix(f"{file} "), one, _spans(one, tokenizer)) for one in made]
    passages = [passage for passage in passages if passage.spans]
    if not passages:
        raise QualityDataError(f"{file}: no answer begins within the first {seqlen} tokens; raise --seqlen")
    return passages


def _windows(file: Path, tokenizer: Tokenizer, seqlen: int) -> list[Passage]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise QualityDataError(f"{file} cannot be read as UTF-8 text: {error}") from None
    ids = tokenizer.encode(text, ())
    if not 2 <= seqlen <= len(ids):
        raise QualityDataError(
            f"{file} has {len(ids)} tokens and --seqlen is {seqlen}; give a longer text, or a window of 2 to {len(ids)}"
        )
    passages: list[Passage] = []
    for start in range(0, len(ids) - seqlen + 1, seqlen):
        name = f"window {len(passages) + 1}"
        sample = Sample(ids[start : start + seqlen], [], [], [], f"{file} {name}")
        passages.append(Passage(name, sample, [(1, seqlen)]))
    return passages


def _spans(sample: Sample, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """The answers of a conversation; of a text everything but its first token and its pictures."""
    ids, (begin, end) = sample.ids, (tokenizer.specials[token] for token in (IM_START, IM_END))
    if begin not in ids:  # in a text it is letters: this is one
        pictures = [(start - 1, start + IMAGE_TOKENS + 1) for start in sample.image_starts]
        edges = [(0, 1), *pictures, (len(ids), len(ids))]
        return [(after, before) for (_, after), (before, _) in pairwise(edges) if after < before]
    head = [begin, *tokenizer.encode("assistant"), *tokenizer.encode("\n")]
    starts = [index + len(head) for index in range(len(ids)) if ids[index : index + len(head)] == head]
    ends = [ids.index(end, start) + 1 if end in ids[start:] else len(ids) for start in starts]
    return [(first, last) for first, last in zip(starts, ends, strict=True) if first < last]


@torch.inference_mode()
def loss(runtime: Runtime, passage: Passage) -> Loss:
    """What `passage` costs `runtime`, whose slots are all free; its cache and tower are those that answer.

    The NTK alpha is that of the passage as a whole, as in training. PromptError if the context is too short for it.
    """
    sample, slots = passage.sample, runtime.slots
    slots.forget()  # what another passage left could reach into tokens that count
    ids = sample.ids[: passage.spans[-1][1]]
    starts = [start for start in sample.image_starts if start < len(ids)]
    pictures = runtime.vision.encode([load_image(image) for image in sample.images[: len(starts)]])
    inputs = Inputs(ids[:-1], starts, pictures.keys, pictures.features)
    sequence = slots.begin(inputs, Sampler(runtime.options, inputs.ids, device=runtime.decoder.device))
    total = 0.0
    try:
        for start, end in passage.spans:
            while (room := start - 1 - len(sequence.held)) > 0:
                slots.prefill_logits(sequence, min(room, CHUNK))
            for first in range(start, end, SCORED):
                targets = ids[first : min(first + SCORED, end)]
                logits = slots.extend(sequence, ids[first - 1 : first - 1 + len(targets)])
                check_logits(logits)
                losses = F.cross_entropy(logits, torch.tensor(targets, device=logits.device), reduction="none")
                total += float(losses.double().sum())
    finally:
        slots.end(sequence)
        slots.forget()
    return Loss(passage.id, total, sum(end - start for start, end in passage.spans))


def perplexity(losses: Iterable[Loss]) -> float:
    """exp of the mean loss of a token."""
    made = list(losses)
    return math.exp(sum(one.nll for one in made) / sum(one.tokens for one in made))
