"""The two hubs: what each lists of a model, and how its client's cache is filled with it.

The clients' own settings hold: HF_ENDPOINT, HF_HOME, HF_TOKEN; MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE,
MODELSCOPE_API_TOKEN.
"""

import hashlib
import importlib
import io
import re
import shlex
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qvl_edge.bundle import sha256_of
from qvl_edge.errors import CheckpointError, QvlError
from qvl_edge.vit_cache import Progress

Source: TypeAlias = Literal["hf", "modelscope"]
_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it. hash: sha256 (64 digits) or git's sha1 of a blob (40), "" where none is known."""

    name: str
    bytes: int
    hash: str

    def __post_init__(self) -> None:
        if self.hash and not _HASH.fullmatch(self.hash):  # it becomes the name of a file
            raise CheckpointError(f"the hub gives {self.hash[:80]!r} as the hash of {self.name}; take another endpoint")


def difference(path: Path, file: RemoteFile) -> str:
    """What `path` has and what the hub lists, if that is not the same; without a hash the size decides."""
    size = path.stat().st_size
    if size != file.bytes or not file.hash:
        return "" if size == file.bytes else f"it has {size} bytes, the hub lists {file.bytes}"
    if len(file.hash) == 64:
        kind, found = "sha256", sha256_of(path)
    else:  # git's name of a blob
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with open(path, "rb") as content:
            kind, found = "git sha1", hashlib.file_digest(content, lambda: digest).hexdigest()
    return "" if found == file.hash else f"its {kind} is {found}, the hub lists {file.hash}"


def size_text(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10_000_000 else f"{count / 1e6:.2f} MB"


def _require(module: str, package: str, extra: str) -> None:
    """QvlError if a hub's client is not installed."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise QvlError(
            f"a model by its name needs the package {package} ({error}); install it with: "
            f"pip install 'qvl-edge[{extra}]', or give a folder"
        ) from None


class Hub(ABC):
    """What the two hubs do differently."""

    source: Source
    default: str  # its usual branch
    commit: str  # what the revision is now, as far as the hub says
    place: Path  # where files go
    blobs: Path | None = None  # where the files of the cache lie, if its folders hold links to them

    def __init__(self, name: str, revision: str | None, to: Path | None, say: Progress):
        self.name, self.revision, self.to, self.say = name, revision or self.default, to, say
        source = "" if self.source == "hf" else f" --source {self.source}"
        self.command = f"qvl-edge pull {name}{source}" + (f" --revision {shlex.quote(revision)}" if revision else "")
        self.command += f" --to {shlex.quote(str(to))}" if to is not None else ""
        self.hashed: set[str] = set()  # hashes of files that were checked on arrival

    @abstractmethod
    def listing(self) -> list[RemoteFile]:
        """The files at the top of the repository."""

    @abstractmethod
    def bytes_here(self, file: RemoteFile) -> int:
        """How much of a file has arrived."""

    @abstractmethod
    def fetch(self, files: list[RemoteFile]) -> Path:
        """Fetch what is missing; the folder that has them all."""

    @abstractmethod
    def cached(self) -> Path | None:
        """The folder in the client's cache, found without the network."""

    @abstractmethod
    def hash_of(self, path: Path) -> str:
        """The hash that a file in the cache ought to have, as far as the cache tells."""

    def check(self, path: Path, file: RemoteFile) -> None:
        """CheckpointError if `path` is not the file that the hub lists; it is removed, and the cache's blob with it.

        A link to anywhere but `blobs` is the user's own: the link goes, what it leads to stays.
        """
        if not (found := difference(path, file)):
            return
        target = path.parent / path.readlink() if path.is_symlink() else path
        path.unlink()
        if self.blobs is not None and target.parent.resolve() == self.blobs.resolve():
            target.unlink(missing_ok=True)
        raise CheckpointError(
            f"{file.name} is damaged: {found}. It was removed; fetch it again with:\n  {self.command}"
        )


class HuggingFace(Hub):
    """Files lie in the cache as its client lays them out: blobs by hash, and a folder of links for each commit.

    The client (2.4) goes on with a cut file while its process lives and starts over in the next one, so large files
    are fetched here, into the client's place for them and under its lock; it then finds and links them.
    """

    source, default = "hf", "main"

    def __init__(self, name: str, revision: str | None, to: Path | None, say: Progress):
        super().__init__(name, revision, to, say)
        _require("huggingface_hub", "huggingface_hub", "download")
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        self.cache = Path(constants.HF_HUB_CACHE)
        self.folder = repo_folder_name(repo_id=name, repo_type="model")
        self.blobs = self.cache / self.folder / "blobs"
        self.place = to or self.blobs

    def listing(self) -> list[RemoteFile]:
        from huggingface_hub import HfApi, errors
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(library_name="qvl_edge")
        try:
            self.commit = str(api.model_info(self.name, revision=self.revision).sha)
            entries = list(api.list_repo_tree(self.name, revision=self.commit))
        except (errors.RepositoryNotFoundError, errors.GatedRepoError, errors.RevisionNotFoundError) as error:
            raise CheckpointError(
                f"{self.name} is not a folder here, and the hub refuses it at {self.revision}: "
                f"{_first_line(error)}\nCheck the name; a private or gated model needs a token in HF_TOKEN"
            ) from None
        return [
            RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
            for entry in entries
            if isinstance(entry, RepoFile)
        ]

    def _target(self, file: RemoteFile) -> Path:
        return self.place / (file.hash if self.to is None else file.name)

    def bytes_here(self, file: RemoteFile) -> int:
        target = self._target(file)
        return next((min(p.stat().st_size, file.bytes) for p in (target, _partial(target)) if p.exists()), 0)

    def fetch(self, files: list[RemoteFile]) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.file_download import are_symlinks_supported

        folder = self.to or self.cache / self.folder / "snapshots" / self.commit
        # without links (Windows outside developer mode) the client would copy a blob that it finds: it fetches itself
        ours = self.to is not None or are_symlinks_supported(self.cache)
        for file in files:
            if ours and (self.to is not None or len(file.hash) == 64):  # LFS files have a sha256
                self._get(file)
            if self.to is None:
                path = Path(hf_hub_download(self.name, file.name, revision=self.revision))
                if path.parent != folder:
                    raise CheckpointError(f"{self.name} has just changed on the hub; run the same command again")
        return folder

    def _get(self, file: RemoteFile) -> None:
        """One file, from where it was cut; checked before it takes its place."""
        from huggingface_hub import file_download, hf_hub_url
        from huggingface_hub.utils import WeakFileLock, build_hf_headers

        target = self._target(file)
        partial = _partial(target)
        lock = self.cache / ".locks" / self.folder / f"{file.hash}.lock"  # the client's own for this blob
        for folder in (target.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if target.exists():
                return
            _refuse_link(partial)
            if partial.exists() and partial.stat().st_size > file.bytes:
                partial.unlink()
            try:
                with _Partial(partial, file) as out:
                    while (had := out.tell()) < file.bytes:
                        if had:
                            self.say(f"{file.name}: going on at {size_text(had)} of {size_text(file.bytes)}")
                        try:
                            file_download.http_get(
                                hf_hub_url(self.name, file.name, revision=self.commit),
                                out,
                                resume_size=had,
                                headers=build_hf_headers(library_name="qvl_edge"),
                                expected_size=file.bytes,
                                displayed_filename=file.name,
                            )
                        except QvlError:
                            raise
                        except Exception as error:
                            if out.tell() <= had:  # nothing came at all: not a cut, a hub that is gone
                                raise
                            self.say(f"{file.name}: {_first_line(error)}")
            except CheckpointError as error:
                partial.unlink()
                raise CheckpointError(f"{error}. It was removed; fetch it again with:\n  {self.command}") from None
            self.check(partial, file)
            partial.replace(target)
            self.hashed.add(file.hash)

    def cached(self) -> Path | None:
        from huggingface_hub import errors, snapshot_download

        try:
            return Path(snapshot_download(self.name, revision=self.revision, local_files_only=True))
        except errors.LocalEntryNotFoundError as error:
            # newer clients compare with the repository's whole list, of which a part is wanted here
            folder = getattr(error, "snapshot_path", None)
            return Path(folder) if folder else None

    def hash_of(self, path: Path) -> str:
        blob = path.readlink().name if path.is_symlink() else ""  # blobs are named by their hash
        return blob if _HASH.fullmatch(blob) else ""


class ModelScope(Hub):
    """Its client keeps cut files, goes on with them and checks their sha256; it draws progress bars on stderr."""

    source, default = "modelscope", "master"

    def __init__(self, name: str, revision: str | None, to: Path | None, say: Progress):
        super().__init__(name, revision, to, say)
        _require("modelscope_hub", "modelscope-hub", "modelscope")
        from modelscope_hub import HubApi, get_default_config

        self.api = HubApi()
        self.commit = self.revision
        cache = Path(get_default_config().cache_dir)
        self.place = to or cache / "models" / name.replace("/", "--") / "snapshots" / self.commit

    def listing(self) -> list[RemoteFile]:
        from modelscope_hub import errors

        try:
            files = self.api.list_repo_files(self.name, "model", revision=self.commit)
        except (errors.NotExistError, errors.AuthenticationError, errors.PermissionDeniedError) as error:
            raise CheckpointError(
                f"{self.name} is not a folder here, and the hub refuses it at {self.commit}: "
                f"{_first_line(error)}\nCheck the name; a private model needs a token in MODELSCOPE_API_TOKEN"
            ) from None
        return [RemoteFile(file.path, file.size, (file.sha256 or "").lower()) for file in files if file.type != "tree"]

    def bytes_here(self, file: RemoteFile) -> int:
        arrived = sum(path.stat().st_size for path in self.place.glob(f"{file.name}*"))  # whole, .incomplete, or parts
        return min(arrived, file.bytes)

    def fetch(self, files: list[RemoteFile]) -> Path:
        names = [file.name for file in files]
        for name in names:
            for suffix in ("incomplete", "parallel_tmp"):  # what the client writes to first
                _refuse_link(self.place / f"{name}.{suffix}")
        return Path(
            self.api.download_repo(self.name, "model", revision=self.commit, local_dir=self.to, allow_patterns=names)
        )

    def cached(self) -> Path | None:
        from modelscope_hub.errors import CacheNotFound

        try:
            return Path(self.api.download_repo(self.name, "model", revision=self.commit, local_files_only=True))
        except CacheNotFound:
            return None

    def hash_of(self, path: Path) -> str:
        del path
        return ""  # this cache does not say; sizes and headers are checked at opening


class _Partial(io.BufferedWriter):
    """The part of a file that has arrived, open at its end; CheckpointError for bytes past those that are listed."""

    def __init__(self, path: Path, file: RemoteFile):
        super().__init__(io.FileIO(path, "ab"))
        self.file = file

    def write(self, chunk: Any) -> int:  # the client hands over at most 10 MiB at once
        if (size := self.tell() + len(chunk)) > self.file.bytes:
            raise CheckpointError(
                f"{self.file.name} does not end: the hub lists {self.file.bytes} bytes and has sent {size}"
            )
        return super().write(chunk)


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _refuse_link(partial: Path) -> None:
    """CheckpointError for a link where a partial file is written: that would write to what it leads to."""
    if partial.is_symlink():
        raise CheckpointError(f"{partial} is a link to {partial.readlink()}, a partial file is none; remove the link")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
