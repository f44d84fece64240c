"""The same question about every image of a folder, on Ray Data: python -m examples.ray.batch IMAGES OUT --question "…"

OUT gets Parquet files with a row per image: path (below IMAGES), text, boxes (JSON), tokens, seconds, error. Run again
after a stop, the job resumes with the images that have no row.
"""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from examples.ray.cluster import add_arguments, loading_of, start_ray
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.engine.request import Request
from qvl_edge.errors import ConfigError, QvlError
from qvl_edge.files import read_json, replacing, write_json
from qvl_edge.runtime import Runtime

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".avif", ".tif", ".tiff", ".heic"}
JOB = "_job.json"  # the job's parameters; readers of Parquet folders skip names that begin with _
PARTS = "part-*.parquet"
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("text", pa.string()),
        ("boxes", pa.string()),  # JSON: the boxes of Answer.to_dict()
        ("tokens", pa.int32()),  # of the answer
        ("seconds", pa.float64()),  # encoding, prefill and decoding, within a batch
        ("error", pa.string()),  # null, or why there is no answer
    ]
)


class Writer:
    """An actor with one Runtime: answers a batch of paths, and writes their rows."""

    def __init__(self, loading: dict[str, Any], images: Path, out: Path, question: str, generation: dict[str, Any]):
        self._runtime = Runtime.from_pretrained(**loading)
        self._images, self._out, self._question, self._generation = images, out, question, generation

    def __call__(self, batch: "dict[str, np.ndarray[Any, Any]]") -> dict[str, list[int]]:
        """Rows written, and how many have an error.

        Written here, not by a sink: what is on disk is done, and a sink would need further cores. The file is named
        after its images, so that a batch repeated after its actor died replaces the same file.
        """
        paths = [str(path) for path in batch["path"]]
        requests = [self._request(path) for path in paths]
        for request in self._runtime.run(requests):
            if request.error is not None and not isinstance(request.error, QvlError):
                raise request.error  # not an error of this image: end the job
        rows = [_row(path, request) for path, request in zip(paths, requests, strict=True)]
        name = hashlib.sha256("\n".join(paths).encode()).hexdigest()[:16]
        with replacing(self._out / PARTS.replace("*", name)) as partial:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial)
        return {"images": [len(rows)], "errors": [sum("error" in row for row in rows)]}

    def _request(self, path: str) -> Request:
        query: list[dict[str, Any]] = [{"image": self._images / path}, {"text": self._question}]
        return Request(query, generation=self._generation)


def _row(path: str, request: Request) -> dict[str, Any]:
    if request.error is not None:
        return {"path": path, "error": str(request.error)}
    answer = request.answer()
    timing = answer.timing
    return {
        "path": path,
        "text": answer.text,
        "boxes": json.dumps([box.to_dict() for box in answer.boxes], ensure_ascii=False),
        "tokens": answer.usage.completion_tokens,
        "seconds": timing.image_s + timing.prefill_s + timing.decode_s,
    }


def find_images(folder: Path) -> list[str]:
    """Paths of the images below `folder`. ConfigError if it is missing, or a name cannot be stored as text."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the one that holds the images")
    paths = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    for path in paths:
        if not path.isprintable():  # a lone surrogate (a byte that is not UTF-8), or a control character
            raise ConfigError(f"the name {path!r} in {folder} is not plain UTF-8 text; rename the file")
    return paths


def resume(out: Path, job: dict[str, Any]) -> set[str]:
    """Paths that have a row in `out`. ConfigError if `out` belongs to another job."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / JOB).exists():
        write_json(out / JOB, job)
    for name, value in read_json(out / JOB).items():
        if job.get(name) != value:
            raise ConfigError(f"{out} holds a job with {name} {value!r}, not {job.get(name)!r}; choose another folder")
    for partial in out.glob(f"{PARTS}.partial"):  # left by a killed job; readers of the folder would open it
        partial.unlink()
    return {path for part in out.glob(PARTS) for path in pq.read_table(part, columns=["path"])["path"].to_pylist()}


def run(args: argparse.Namespace) -> None:
    """Answer the images that have no row yet."""
    images, out = args.images.resolve(), args.out.resolve()
    paths = find_images(images)
    generation = {"do_sample": False, "max_new_tokens": args.max_new_tokens}
    model = Checkpoint(args.bundle).fingerprint
    done = resume(out, {"model": model, "images": str(images), "question": args.question, **generation})
    left = [path for path in paths if path not in done]
    print(f"{len(paths)} images, {len(paths) - len(left)} have a row, {len(left)} to answer", flush=True)
    if not left:
        return
    batch = min(args.batch, math.ceil(len(left) / args.actors))  # work for every actor
    start_ray(args.address)
    ray.data.DataContext.get_current().enable_progress_bars = False  # progress is printed below
    written = ray.data.from_items(
        [{"path": path} for path in left], override_num_blocks=math.ceil(len(left) / batch)
    ).map_batches(
        Writer,
        fn_constructor_args=(loading_of(args), images, out, args.question, generation),
        batch_size=batch,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        num_cpus=args.num_cpus,
        num_gpus=args.num_gpus,
    )
    count = errors = 0
    for part in written.iter_rows():
        count, errors = count + part["images"], errors + part["errors"]
        print(f"{count} of {len(left)} images, {errors} with an error", flush=True)
    ray.shutdown()


def main(arguments: list[str] | None = None) -> int:
    """Run the job; print a QvlError and return 1."""
    parser = argparse.ArgumentParser(prog="python -m examples.ray.batch", description=__doc__)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="a folder, searched recursively")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the rows; all machines need access to both")
    parser.add_argument("--question", required=True)
    add_arguments(parser)
    parser.add_argument("--actors", type=int, default=1, metavar="N", help="processes, each with a model (1)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images per file (64)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="per answer (256)")
    args = parser.parse_args(arguments)
    try:
        run(args)
    except QvlError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
