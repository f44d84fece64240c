"""Reading and writing files: JSON, JSON lines and tensors, each written beside its place and renamed, and locks."""

import codecs
import errno
import hashlib
import json
import math
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING, Any, TypeAlias

from qvl_edge.errors import BundleError, ConfigError, QvlError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Layout: TypeAlias = "Mapping[str, tuple[torch.dtype, tuple[int, ...]]]"
"""dtype and shape of each tensor of a safetensors file, in the order of its data."""
_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.int32": "I32"}
_DIGEST = 64  # characters of a sha256
_COARSEST_CLOCK_S = 3  # FAT counts the times of files in twos
_ALIGNMENT = 8  # of the data within a safetensors file, as in those of safetensors' own writer

POINTER = (
    "{path} is a Git LFS pointer and not the file itself: the repository was cloned without its large files. "
    "Fetch them with\n  git -C {folder} lfs pull"
)
_NO_ROOM = {
    errno.ENOSPC: "the disk of {folder} is full",
    errno.EDQUOT: "your quota on the disk of {folder} is used up",
    errno.EFBIG: "the size of files in {folder} is limited (ulimit -f)",
}
_WRITABLE = "give a folder that you may write to; the one for caches is that of XDG_CACHE_HOME"
_REMEDIES = {
    **dict.fromkeys(_NO_ROOM, "free some space, and run the same command again"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n 1024), and run it again"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),
        _WRITABLE,
    ),
}
MAX_SETTINGS = 256 << 20  # bytes of a file of settings or words; the published vocabulary has 2.6 MB
_LFS = b"version https://git-lfs.github.com/spec/v1"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the yielded path beside `path`; on success it takes `path`'s place, on any error nothing stays.

    What an earlier run left there is removed first, a link without what it leads to. A full disk, or a limit of it,
    becomes a BundleError with the free bytes.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except Exception as error:  # OSError, or SafetensorError of a library that need not be installed to get here
        free = shutil.disk_usage(path.parent).free
        for number in _NO_ROOM:
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                raise BundleError(
                    f"{_NO_ROOM[number].format(folder=path.parent)} ({free} bytes free) while writing {path.name}; "
                    "nothing was replaced. Free some space and run the same command again."
                ) from None
        raise
    finally:
        partial.unlink(missing_ok=True)


def system_error(error: OSError) -> str:
    """What the system refused, where, and what to do about it."""
    where = f"{error.filename}: " if error.filename else ""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{where}{error.strerror or error}" + (f"; {remedy}" if remedy else "")


def check_free_space(folder: Path, needed: int) -> None:
    """BundleError if the disk of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BundleError(
            f"{folder} needs {needed / 1e6:.1f} MB and its disk has {free / 1e6:.1f} MB free; free some space or "
            "choose another folder"
        )


def read_bytes(path: Path, *, error: type[QvlError] = ConfigError, most: float = MAX_SETTINGS) -> bytes:
    """A file of at most so many bytes; an `error` for anything else, as a pipe would be waited for."""
    try:
        found = path.stat()
        plain = S_ISREG(found.st_mode) or S_ISDIR(found.st_mode)  # of which the system says what it is
        content = path.read_bytes() if plain and found.st_size <= most else None
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the path
        raise error(f"{path} cannot be read: {getattr(reason, 'strerror', None) or reason}") from None
    if content is None:
        large = f"has {found.st_size} bytes, at most {most:.0f} are read"
        what = large if found.st_size > most else "is a pipe or a device"
        raise error(f"{path} {what}; copy it from the model")
    if content.startswith(_LFS):
        raise error(POINTER.format(path=path, folder=path.parent))
    return content


def read_text(path: Path, *, error: type[QvlError] = ConfigError, most: float = math.inf) -> str:
    """The text of a UTF-8 file without its byte order mark; an `error` naming the file if there is none."""
    try:
        text = read_bytes(path, error=error, most=most).decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not UTF-8 text: {reason}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str, where: object, *, error: type[QvlError] = ConfigError) -> Any:
    """The value of a JSON text; an `error` that says `where` it is if it is broken."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as reason:  # ValueError also for a number of more than 4,300 digits
        raise error(f"{where} is not valid JSON: {reason}") from None


def read_json(path: Path, *, error: type[QvlError] = ConfigError) -> dict[str, Any]:
    """A JSON object from `path`; a missing, broken or non-object file is an `error` naming it."""
    if not path.exists():
        raise error(f"{path} is missing; is {path.parent} the folder of a checkpoint or bundle?")
    value = parse_json(read_text(path, error=error, most=MAX_SETTINGS), path, error=error)
    if not isinstance(value, dict):
        raise error(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`value` as indented JSON."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_jsonl(
    path: Path, *, resuming: bool = False, error: type[QvlError] = ConfigError
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line of a JSON lines file that is not blank; a byte order mark is skipped.

    resuming: the file may be missing, and a last line that a killed run cut short is skipped. `error` is raised, with
    the file and the line, for anything that cannot be read as a JSON object.
    """
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        if resuming:
            return
        raise error(f"{path} is missing") from None
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}") from None
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError) as reason:  # ValueError also for a number of more than 4,300 digits
            if resuming and number == len(lines):
                return
            raise error(f"{path}, line {number} is not valid JSON: {reason}") from None
        if not isinstance(value, dict):
            raise error(f"{path}, line {number} holds a {type(value).__name__}, expected an object")
        yield number, value


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    with replacing(path) as partial:
        partial.write_text("".join(map(_json_line, rows)), encoding="utf-8")


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a file that ends with a whole line (after a kill: read it with `resuming`, then write_jsonl)."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(map(_json_line, rows)))


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """A safetensors file, after checking that it fits on the disk."""
    from safetensors.torch import save_file  # imports torch, which readers of settings do without

    check_free_space(path.parent, sum(tensor.nbytes for tensor in tensors.values()))
    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
        partial.chmod(mode)  # safetensors writes files that only their owner can read


def layout_bytes(layout: Layout) -> int:
    """Bytes of the tensors of a file."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def write_shard(path: Path, layout: Layout, pieces: "Callable[[str], Iterable[Tensor]]") -> None:
    """A safetensors file from pieces of its tensors, so that a shard of 2 GB passes through some megabytes of memory.

    pieces(name) yields consecutive parts of the flattened tensor, on the CPU. The format, from safetensors' README: the
    header's length in 8 bytes, little-endian; the header, JSON with each tensor's dtype, shape and place [begin, end)
    in the data, padded with spaces; the data. ValueError if the pieces of a tensor do not add up to it; BundleError if
    the disk is too small.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + layout_bytes({name: (dtype, shape)})
        header[name] = {"dtype": _DTYPES[str(dtype)], "shape": list(shape), "data_offsets": [begin, end]}
    check_free_space(path.parent, end)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape) in layout.items():
            missing = math.prod(shape)
            for piece in pieces(name):
                if piece.dtype != dtype:
                    raise ValueError(f"{name} is {dtype}, and a piece of it {piece.dtype}")
                file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
                missing -= piece.numel()
            if missing:
                raise ValueError(f"{name} has {math.prod(shape)} values, and its pieces {math.prod(shape) - missing}")


def is_plain_name(name: object) -> bool:
    """Whether `name` is the name of a file inside a folder, on every system: no path, no drive, no parent."""
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")
    return plain and len(str(name).encode(errors="surrogatepass")) <= 255


def copy_file(source: Path, target: Path) -> None:
    """A copy of `source` in the place of `target`."""
    with replacing(target) as partial:
        shutil.copyfile(source, partial)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered(files: Iterable[Path], compute: Callable[[], str]) -> str:
    """What `compute` makes of the bytes of these files, kept in `cache_home` until one has another size, time or inode.

    Nothing is kept of a file that was changed in the last seconds: the clock of its disk may be too coarse to show the
    next change. Where the cache cannot be written, every call computes.
    """
    try:
        stats = [(str(path.resolve()), path.stat()) for path in sorted(files)]
    except FileNotFoundError:  # removed since it was opened
        return compute()
    stamps = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats]
    kept = None
    with suppress(OSError):
        kept = cache_home() / "hashes" / hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
        if len(text := kept.read_text(encoding="ascii")) == _DIGEST:
            return text
    made = compute()
    if kept is not None and all(time.time() - stat.st_mtime > _COARSEST_CLOCK_S for _, stat in stats):
        with suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as partial:
                partial.write_text(made, encoding="ascii")
    return made


def is_pointer(path: Path) -> bool:
    """Whether the file is the text that git keeps in the place of a large file, until `git lfs pull` fetches it."""
    with open(path, "rb") as file:
        return file.read(len(_LFS)) == _LFS


def cache_home() -> Path:
    """Where this package keeps what can be made again: $XDG_CACHE_HOME/qvl_edge, by default ~/.cache/qvl_edge."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qvl_edge"
    except RuntimeError:
        raise BundleError("this user has no home folder; set XDG_CACHE_HOME to one that may be written to") from None


@contextmanager
def locked(path: Path, *, busy: str | None = None) -> Iterator[None]:
    """Hold the lock file `path`, which stays there; the system lifts the lock when its holder ends, killed or not.

    While another process holds it, wait; or, if a message `busy` is given, raise it as a BundleError.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, blocking=busy is None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BundleError(busy) from None
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, _WRITABLE)
        raise BundleError(f"{path.parent} cannot be written to: {error.strerror or error}; {remedy}") from None
    try:
        yield
    finally:
        lock.release()
