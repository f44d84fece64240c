"""A model's predictions for items, saved line by line; stopped at any moment, the next run goes on and ends alike.

Items go in chunks of CHUNK, the unit that is kept or done again. Inside one, sequences join and leave between decode
steps in an order that depends on the items alone, and every chunk starts with empty caches: which products a token's
logits came from, down to the rounding of their sums, does not depend on where an earlier run was stopped.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from qvl_edge import Runtime
from qvl_edge.engine.inputs import Inputs
from qvl_edge.engine.run import Run
from qvl_edge.engine.sampling import Sampler, check_logits, check_tokens
from qvl_edge.engine.slots import Sequence as Slotted
from qvl_edge.engine.slots import Slots
from qvl_edge.errors import QvlError
from qvl_edge.evaluate.item import Item, Prediction
from qvl_edge.evaluate.task import QualityDataError
from qvl_edge.text.prompt import Content, ImageRef

CHUNK = 64  # items between two lasting states


def content_of(item: Item) -> Content:
    """The item's prompt as Runtime takes it: the images where they stand, texts that open nothing."""
    return [ImageRef(part) if isinstance(part, Path) else part for part in item.content]


class Predicts(Protocol):
    """What turns items into predictions."""

    def predict(self, items: Sequence[Item]) -> list[Prediction]:
        """Predictions in the items' order; they depend on these items alone."""
        ...


class Predictor:
    """Answers items with a loaded model, several at once in its slots (Runtime's option `slots`)."""

    def __init__(self, runtime: Runtime, *, chat_format: str, generation: Mapping[str, Any]):
        self.runtime, self.chat_format = runtime, chat_format
        self.generation = {"do_sample": False, **generation}

    def predict(self, items: Sequence[Item]) -> list[Prediction]:
        """Predictions in the items' order. The caches are empty at the beginning."""
        self.runtime.forget()
        generated = iter(self._generate([item for item in items if not item.options]))
        return [self._choose(item) if item.options else next(generated) for item in items]

    def _prepare(self, item: Item) -> Run:
        try:
            return self.runtime.prepare(content_of(item), None, chat_format=self.chat_format, **self.generation)
        except QvlError as error:  # an image that is damaged, a prompt that is too long
            raise QualityDataError(f"item {item.id}: {error}") from None

    def _inputs(self, run: Run) -> Inputs:
        for image in run.images:  # one at a time: an image's features do not depend on its neighbours
            self.runtime.vision.encode([image])
        return self.runtime.encode(run)

    def _generate(self, items: Sequence[Item]) -> list[Prediction]:
        slots = self.runtime.slots
        waiting, running = list(reversed(items)), dict[Slotted, tuple[Item, Run]]()
        done: dict[str, Prediction] = {}

        def take(sequence: Slotted, tokens: Iterable[int]) -> None:
            item, run = running[sequence]
            for token in tokens:
                check_tokens([token])
                run.push(token)
                if run.finish_reason is not None:
                    slots.end(sequence)
                    del running[sequence]
                    done[item.id] = Prediction(item.id, self._text(run))
                    return

        try:
            while waiting or running:
                while waiting and slots.free:
                    item = waiting.pop()
                    run = self._prepare(item)
                    sequence = slots.begin(self._inputs(run), self.runtime.sampler(run))
                    running[sequence] = (item, run)
                    while (first := slots.prefill(sequence)) is None:
                        pass
                    take(sequence, [first])
                if running:
                    for sequence, tokens in slots.advance().items():
                        take(sequence, tokens)
        finally:
            for sequence in running:
                slots.end(sequence)
        return [done[item.id] for item in items]

    def _text(self, run: Run) -> str:
        """What was generated. In raw format without special tokens, boxes' tags too, as upstream's evaluations decode
        (skip_special_tokens=True): a chat model writes <|im_end|> there, which ends nothing."""
        if self.chat_format == "chatml":
            return run.text.strip()
        return self.runtime.tokenizer.decode(run.token_ids, skip_special_tokens=True).strip()

    def _choose(self, item: Item) -> Prediction:
        run = self._prepare(item)
        inputs = self._inputs(run)
        encode = self.runtime.tokenizer.encode
        sums = tuple(
            float(continuation_logprobs(self.runtime, inputs, encode(option)).sum()) for option in item.options
        )
        best = max(range(len(sums)), key=sums.__getitem__)
        return Prediction(item.id, item.options[best], best, sums)


@torch.inference_mode()
def continuation_logits(slots: Slots, inputs: Inputs, sampler: Sampler, ids: Sequence[int]) -> torch.Tensor:
    """Logits (T, vocab) float32 from which each of the T tokens `ids` after the prompt would be chosen."""
    sequence = slots.begin(inputs, sampler)
    try:
        while (last := slots.prefill_logits(sequence)) is None:
            pass
        rest = [slots.extend(sequence, list(ids[:-1]))] if len(ids) > 1 else []
    finally:
        slots.end(sequence)
    logits = torch.cat([last, *rest])
    check_logits(logits)
    return logits


def continuation_logprobs(runtime: Runtime, inputs: Inputs, ids: Sequence[int]) -> torch.Tensor:
    """Natural-log probability (T,) float32 of each token of `ids` after the prompt."""
    sampler = Sampler(runtime.options, inputs.ids, device=runtime.decoder.device)
    logits = continuation_logits(runtime.slots, inputs, sampler, ids)
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON lines file that was being written; a last one without its end is left out."""
    if path.exists():
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                raise QualityDataError(f"{path}, line {number} is damaged; remove that file to start again")
            yield value


def predict_all(
    predictor: Predicts,
    items: Sequence[Item],
    path: Path,
    header: Mapping[str, Any],
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Prediction]:
    """Predictions of all items by id, from `path` as far as an earlier run came, and appended to it.

    header says what they are predictions of (model, task, data, options); QualityDataError if `path` holds others.
    """
    wanted = json.loads(json.dumps(header))
    lines = list(read_lines(path))
    if lines and lines[0] != wanted:
        differs = [key for key in {*wanted, *lines[0]} if wanted.get(key) != lines[0].get(key)]
        key = min(differs)
        raise QualityDataError(
            f"{path} holds predictions with {key} {lines[0].get(key)!r}, this run has {wanted.get(key)!r}; give "
            "another --out, or remove that file"
        )
    try:
        found = [Prediction.from_dict(line) for line in lines[1:]]
    except (KeyError, TypeError):
        raise QualityDataError(f"{path} holds something else than predictions; give another --out") from None
    kept = len(found) if len(found) == len(items) else len(found) // CHUNK * CHUNK
    for item, prediction in zip(items, found[:kept], strict=False):
        if item.id != prediction.id:
            raise QualityDataError(
                f"{path} holds item {prediction.id!r} where {item.id!r} is expected; remove that file to start again"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    keep = [wanted, *(prediction.to_dict() for prediction in found[:kept])]
    start = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in keep)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(start, encoding="utf-8")
    partial.replace(path)
    predictions = {prediction.id: prediction for prediction in found[:kept]}
    tick(kept, len(items))
    with path.open("a", encoding="utf-8") as file:
        for first in range(kept, len(items), CHUNK):
            made = predictor.predict(items[first : first + CHUNK])
            file.write("".join(json.dumps(one.to_dict(), ensure_ascii=False) + "\n" for one in made))
            file.flush()
            predictions |= {one.id: one for one in made}
            tick(min(first + CHUNK, len(items)), len(items))
    return predictions
