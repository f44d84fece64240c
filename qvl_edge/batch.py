"""One question about many pictures: answered together, in order, and kept in a file that a later run continues."""

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image
from tqdm import tqdm

from qvl_edge.answer import Answer
from qvl_edge.engine.request import Request
from qvl_edge.errors import ConfigError, QvlError
from qvl_edge.files import append_jsonl, read_jsonl, write_jsonl
from qvl_edge.vision.source import ImageLike, is_path, read_source

if TYPE_CHECKING:
    from qvl_edge.runtime import Runtime


def answer_each(
    runtime: "Runtime",
    images: Sequence[ImageLike],
    question: str,
    *,
    output: str | PathLike[str] | None = None,
    progress: bool | None = None,
    **generation: Any,
) -> Iterator[Answer | QvlError]:
    """The answer about each picture, or why there is none, in the order of `images`; one a slot at once.

    output: a JSON lines file with one answer a line. If it exists, it is continued: ConfigError if it holds another
    question, other pictures or other options. progress: a bar on stderr; None: on a terminal only.
    """
    kept: list[Answer | QvlError] = []
    if not isinstance(output, str | PathLike | None):
        raise ConfigError(f"output is a {type(output).__name__}, expected the path of a JSON lines file")
    path = None if output is None else Path(output)
    names = [] if path is None else [_name(image) for image in images]
    asked = {"question": question, "options": {name: value for name, value in generation.items() if value is not None}}
    if path is not None:
        asked["model"] = runtime.fingerprint
        asked = json.loads(json.dumps(asked))  # as it is read again: a tuple is a list
        kept = _kept(path, names, asked)
    with tqdm(
        total=len(images), initial=len(kept), unit="image", disable=None if progress is None else not progress
    ) as bar:
        yield from kept
        order, early, expected = dict[int, int](), dict[int, Request](), len(kept)

        def numbered() -> Iterator[Request]:
            for index in range(len(kept), len(images)):
                query: list[dict[str, Any]] = [{"image": images[index]}, {"text": question}]
                request = Request(query, generation=generation)
                order[id(request)] = index
                yield request

        with closing(cast(Generator[Request, None, None], runtime.run(numbered()))) as done:
            for request in done:
                early[order[id(request)]] = request
                while (ready := early.pop(expected, None)) is not None:
                    if ready.error is not None and not isinstance(ready.error, QvlError):
                        raise ready.error
                    answer = ready.error or ready.answer()
                    if path is not None:
                        row = {"error": str(answer)} if isinstance(answer, QvlError) else answer.to_dict()
                        append_jsonl(path, [{"image": names[expected], **asked, **row}])
                    expected += 1
                    bar.update()
                    yield answer


def _kept(path: Path, names: Sequence[str], asked: Mapping[str, Any]) -> list[Answer | QvlError]:
    """What an earlier run left in `path`, without a line that it could not finish."""
    rows = [row for _, row in read_jsonl(path, resuming=True)]
    if len(rows) > len(names):
        raise ConfigError(f"{path} has {len(rows)} answers and there are {len(names)} pictures; give another file")
    for number, (row, name) in enumerate(zip(rows, names, strict=False), 1):
        for key, value in {"image": name, **asked}.items():
            if row.get(key) != value:
                raise ConfigError(
                    f"{path}, line {number} has {key} {row.get(key)!r}, this run has {value!r}; give another file or "
                    "remove that one"
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, rows)
    return [QvlError(row["error"]) if "error" in row else Answer.from_dict(row) for row in rows]


def _name(image: ImageLike) -> str:
    """A picture's path, or the hash of one that has none."""
    if isinstance(image, PathLike) or (isinstance(image, str) and is_path(image)):
        return fspath(image)
    content, _ = read_source(image)
    if isinstance(content, Image.Image):
        content = f"{content.mode} {content.size}".encode() + content.tobytes()
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
