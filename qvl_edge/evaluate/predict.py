"""A model's predictions for items, saved as JSON lines; an interrupted run resumes and ends in the same predictions.

A chunk of CHUNK items is kept whole or computed again. Every chunk starts with empty caches, and the order in which its
items are batched depends on the items alone, so the logits, down to their rounding, do not depend on where an earlier
run was interrupted.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qvl_edge import Runtime
from qvl_edge.engine.request import Request
from qvl_edge.errors import QvlError
from qvl_edge.evaluate.task import Item, Prediction, QualityDataError
from qvl_edge.files import append_jsonl, read_jsonl, write_jsonl
from qvl_edge.text.prompt import Content, ImageRef
from qvl_edge.vision.image import load_picture

CHUNK = 64  # items that are written at once


def content_of(item: Item) -> Content:
    """The item's prompt as Runtime takes it; markup in its texts opens nothing."""
    return [ImageRef(part) if isinstance(part, Path) else part for part in item.content]


class Predictor:
    """Answers items with a loaded model, or scores them, as many at once as it has slots."""

    def __init__(self, runtime: Runtime, *, chat_format: str, generation: Mapping[str, Any]):
        self.runtime, self.chat_format = runtime, chat_format
        self.generation = {"do_sample": False, **generation}

    def predict(self, items: Sequence[Item]) -> list[Prediction]:
        """Predictions in the items' order, starting with empty caches: they depend on these items alone."""
        self.runtime.forget()
        asked = {self._request(item): item for item in items if not item.options}
        made = {asked[request].id: self._prediction(asked[request], request) for request in self._answered(asked)}
        return [self._choose(item) if item.options else made[item.id] for item in items]

    def _request(self, item: Item) -> Request:
        if item.prompt is not None:  # the NTK alpha is that of the prompt as a whole, as in training
            return Request(prompt=item.prompt, scored=item.scored)
        return Request(content_of(item), chat_format=self.chat_format, generation=self.generation)

    def _answered(self, asked: Mapping[Request, Item]) -> Iterator[Request]:
        """Each request as it gets done. QualityDataError names the item whose request fails."""
        for request in self.runtime.run([*asked]):
            if isinstance(request.error, QvlError):  # a damaged image, a prompt that is too long
                raise QualityDataError(f"item {asked[request].id}: {request.error}")
            if request.error is not None:
                raise request.error
            yield request

    def _prediction(self, item: Item, request: Request) -> Prediction:
        if item.scored:
            return Prediction(item.id, "", None, (math.fsum(request.scores),))
        return Prediction(item.id, self._text(request))

    def _text(self, request: Request) -> str:
        """The generated text. In raw format without special tokens, box tags included, as upstream's evaluations decode
        (skip_special_tokens=True): a chat model writes <|im_end|> there, which does not end it."""
        if self.chat_format == "chatml":
            return request.answer().text
        return self.runtime.tokenizer.decode(request.token_ids, skip_special_tokens=True).strip()

    def _choose(self, item: Item) -> Prediction:
        """The likeliest option. The prompt is prefilled once: all options begin with what its slot holds."""
        try:
            size, background = self.runtime.config.visual.image_size, self.runtime.background
            query: Content = [
                ImageRef(load_picture(part, size, background=background)) if isinstance(part, Path) else part
                for part in item.content
            ]
            scores = [self.runtime.score(query, option, chat_format=self.chat_format) for option in item.options]
        except QvlError as error:
            raise QualityDataError(f"item {item.id}: {error}") from None
        sums = tuple(map(sum, scores))
        best = max(range(len(sums)), key=sums.__getitem__)
        return Prediction(item.id, item.options[best], best, sums)


def predict_all(
    predictor: Predictor, items: Sequence[Item], path: Path, header: Mapping[str, Any]
) -> dict[str, Prediction]:
    """Predictions of all items by id: those that an earlier run wrote to `path`, and the missing ones, appended to it.

    header says what they are predictions of (model, task, data, options). QualityDataError if `path` holds others.
    """
    wanted = json.loads(json.dumps(header))
    lines = [line for _, line in read_jsonl(path, resuming=True, error=QualityDataError)]
    if lines and lines[0] != wanted:
        key = min(key for key in {*wanted, *lines[0]} if wanted.get(key) != lines[0].get(key))
        raise QualityDataError(
            f"{path} holds predictions with {key} {lines[0].get(key)!r}, this run has {wanted.get(key)!r}; give "
            "another --out, or remove that file"
        )
    try:
        found = [Prediction.from_dict(line) for line in lines[1:]]
    except (KeyError, TypeError):
        raise QualityDataError(f"{path} holds something other than predictions; give another --out") from None
    kept = len(found) if len(found) == len(items) else len(found) // CHUNK * CHUNK
    for item, prediction in zip(items, found[:kept], strict=False):
        if item.id != prediction.id:
            raise QualityDataError(
                f"{path} holds item {prediction.id!r} where {item.id!r} is expected; remove that file to start again"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, [wanted, *map(asdict, found[:kept])])
    predictions = {prediction.id: prediction for prediction in found[:kept]}
    with tqdm(total=len(items), initial=kept, desc=path.stem, unit="item") as bar:
        for first in range(kept, len(items), CHUNK):
            made = predictor.predict(items[first : first + CHUNK])
            append_jsonl(path, map(asdict, made))
            predictions |= {one.id: one for one in made}
            bar.update(len(made))
    return predictions
