"""The data files of tasks, as records that name their file and line when a field is missing or wrong."""

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl_edge import files
from qvl_edge.errors import ImageError
from qvl_edge.evaluate.task import QualityDataError
from qvl_edge.files import parse_json, read_jsonl, replacing
from qvl_edge.vision.formats import name_of
from qvl_edge.vision.image import load_frame
from qvl_edge.vision.source import from_base64

_MISSING = object()
_MAX_PIXELS = 10**9  # of an image's side; NaN and infinity are not below it either
_MAX_CELL = 1 << 28  # characters in a cell of a .tsv; the csv module's own limit is 131,072, an image has more


@dataclass(frozen=True)
class Row:
    """One record: its fields, and where it comes from. A field may have several published names; others are ignored."""

    where: str  # "FILE, line 3"
    values: Mapping[str, Any]

    def has(self, *names: str) -> bool:
        """Whether one of the fields is present."""
        return any(name in self.values for name in names)

    def get(self, *names: str, default: Any = _MISSING) -> Any:
        """The first of the fields that is present; QualityDataError if none is and there is no default."""
        for name in names:
            if name in self.values:
                return self.values[name]
        if default is not _MISSING:
            return default
        wanted = " or ".join(repr(name) for name in names)
        raise QualityDataError(f"{self.where} has no field {wanted}; it has {', '.join(self.values) or 'none'}")

    def text(self, *names: str) -> str:
        """A non-empty string."""
        value = self.get(*names)
        if not isinstance(value, str) or not value.strip():
            raise self.error(names, "text", value)
        return value

    def texts(self, *names: str) -> list[str]:
        """One string or a list of them; a list may also hold records with the field "answer", as VQA's do."""
        value = self.get(*names)
        entries = value if isinstance(value, list) else [value]
        found = [entry.get("answer") if isinstance(entry, dict) else entry for entry in entries]
        texts = [entry for entry in found if isinstance(entry, str)]
        if not texts or len(texts) < len(found):
            raise self.error(names, "text or a list of texts", value)
        return texts

    def integer(self, *names: str) -> int:
        """An integer, also where it is written as text."""
        value = self.get(*names)
        try:
            if isinstance(value, int | str) and not isinstance(value, bool):
                return int(value)
        except ValueError:
            pass
        raise self.error(names, "a whole number", value)

    def pixels(self, *names: str) -> int:
        """The length of an image's side."""
        value = self.integer(*names)
        if not 0 < value < _MAX_PIXELS:
            raise self.error(names, "a number of pixels above 0", value)
        return value

    def box(self, *names: str) -> tuple[float, ...]:
        """Four numbers x1, y1, x2, y2 with x1 < x2 and y1 < y2; of a list of boxes, the first."""
        value = self.get(*names)
        found = value[0] if isinstance(value, list) and value and isinstance(value[0], list) else value
        numbers = isinstance(found, list) and all(
            isinstance(edge, int | float) and not isinstance(edge, bool) and abs(edge) < _MAX_PIXELS for edge in found
        )
        if not numbers or len(found) != 4 or found[0] >= found[2] or found[1] >= found[3]:
            raise self.error(names, "a box [x1, y1, x2, y2] in pixels with x1 < x2 and y1 < y2", value)
        return tuple(found)

    def image(self, name: str, folder: Path) -> Path:
        """The path of an existing image; a relative name starts from `folder`."""
        path = folder / name
        try:
            exists = path.is_file()
        except OSError as error:
            raise QualityDataError(f"{self.where}: no image is named {_short(name)}: {error.strerror}") from None
        if not exists:
            raise QualityDataError(
                f"{self.where}: image {name!r} is not at {path}; --images DIR names the folder that it starts from, "
                f"now {folder}"
            )
        return path

    def error(self, names: Iterable[str], expected: str, found: Any) -> QualityDataError:
        """The error for a field that does not hold what is expected."""
        name = next((name for name in names if name in self.values), "")
        return QualityDataError(f"{self.where}, field {name!r}: expected {expected}, found {_short(found)}")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:80] + "…"


def read_rows(file: Path) -> list[Row]:
    """The records of a .jsonl, a .tsv with a header, or a .json.

    A .json is a list, an object whose "questions" or "data" is the list, or an object of records by question id.
    """
    if file.suffix == ".jsonl":
        _refuse_folder(file)
        lines = read_jsonl(file, error=QualityDataError)
        rows = [Row(f"{file}, line {number}", record) for number, record in lines]
    elif file.suffix == ".tsv":
        rows = _read_tsv(file)
    else:
        rows = records_of(file, read_json(file))
    if not rows:
        raise QualityDataError(f"{file} has no records")
    return rows


def read_json(file: Path) -> Any:
    """The content of a JSON file."""
    return parse_json(read_text(file), file, error=QualityDataError)


def read_text(file: Path) -> str:
    """The text of a UTF-8 file without its byte order mark."""
    _refuse_folder(file)
    return files.read_text(file, error=QualityDataError)


def _refuse_folder(file: Path) -> None:
    if file.is_dir():
        raise QualityDataError(f"{file} is a folder; --data names the task's file")


def records_of(file: Path, value: Any, *keys: str) -> list[Row]:
    """The records of a JSON file's value, under one of `keys` (by default "questions" or "data") if it is an object."""
    if isinstance(value, dict):
        key = next((key for key in keys or ("questions", "data") if isinstance(value.get(key), list)), None)
        if key is None and not keys and value and all(isinstance(record, dict) for record in value.values()):
            return [Row(f"{file}, record {name!r}", {"question_id": name, **one}) for name, one in value.items()]
        value = value[key] if key else None
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        wanted = " or ".join(repr(key) for key in keys or ("questions", "data"))
        raise QualityDataError(f"{file} is neither a list of records nor an object with such a list under {wanted}")
    return [Row(f"{file}, record {number}", record) for number, record in enumerate(value, 1)]


def ids_of(rows: Sequence[Row], *names: str) -> list[str]:
    """The rows' ids from the first of the fields that is present, or their numbers from 1 on; made unique."""
    return number_ids(row.get(*names, default=place) for place, row in enumerate(rows, 1))


def number_ids(ids: Iterable[Any]) -> list[str]:
    """Ids as text, made unique: one that repeats gets "#2", "#3" …, as where a file numbers its images."""
    seen: Counter[str] = Counter()
    found = []
    for one in map(str, ids):
        seen[one] += 1
        found.append(one if seen[one] == 1 else f"{one}#{seen[one]}")
    return found


def save_images(file: Path, images: Path | None, rows: Iterable[tuple[Row, str]]) -> list[Path]:
    """Save the base64 images of a .tsv's rows in FILE-NAME_images, beside the file or in `images`; their paths.

    An image keeps its bytes and is named by their hash: one that several rows share is written once, and reading the
    file again writes nothing.
    """
    folder = (images or file.parent) / f"{file.stem}_images"
    paths = []
    for row, text in rows:
        try:
            data = from_base64(text)
            load_frame(data)
            suffix = (name_of(data) or "image").lower()
        except ImageError:
            raise row.error(["image"], "an image file in base64", text) from None
        path = folder / f"{hashlib.sha256(data).hexdigest()[:24]}.{suffix}"
        try:
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(path) as partial:
                    partial.write_bytes(data)
        except OSError as error:
            raise QualityDataError(
                f"{path} cannot be written ({error.strerror or error}); give --images a writable folder"
            ) from None
        paths.append(path)
    return paths


def _read_tsv(file: Path) -> list[Row]:
    """Quoted as csv files are; an empty cell is a missing field."""
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_CELL))
    reader = csv.reader(io.StringIO(read_text(file), newline=""), delimiter="\t")
    rows = []
    try:
        header = next(reader, [])
        for cells in reader:
            where = f"{file}, line {reader.line_num}"
            if len(cells) != len(header):
                raise QualityDataError(f"{where} has {len(cells)} cells, the header has {len(header)} names")
            rows.append(Row(where, {name: cell for name, cell in zip(header, cells, strict=True) if cell}))
    except csv.Error as error:
        raise QualityDataError(f"{file}, line {reader.line_num} is not a row of a .tsv: {error}") from None
    return rows
