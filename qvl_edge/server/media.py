"""The URL of an image_url part -> the picture that the model sees."""

import asyncio
import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit
from urllib.request import url2pathname

from qvl_edge.errors import ImageError
from qvl_edge.server.fetch import MAX_BYTES, Fetcher
from qvl_edge.server.refusal import Refusal, invalid
from qvl_edge.vision.decoder import Decoders
from qvl_edge.vision.formats import served_formats
from qvl_edge.vision.image import Picture
from qvl_edge.vision.rgb import BACKGROUND
from qvl_edge.vision.source import from_base64, from_data_uri, is_base64

_DECODERS = Decoders()  # of the process, as its memory is
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # one letter is a drive of Windows
# NOFOLLOW: it may have become a link since; NONBLOCK: opening a pipe would wait for a writer. Windows has BINARY alone
_FLAGS = sum(getattr(os, f"O_{name}", 0) for name in ("NOFOLLOW", "NONBLOCK", "CLOEXEC", "BINARY"))


@dataclass(frozen=True)
class Media:
    """Where images may come from: the request itself, and files below local_root and hosts of the fetcher if they are
    given."""

    local_root: Path | None = None
    fetcher: Fetcher | None = None
    max_bytes: int = MAX_BYTES  # of one image
    image_size: int = 448  # pixels a side of what the model sees
    background: str = BACKGROUND

    def for_model(self, runtime: Any) -> Self:
        """The same for the size and the background that a Runtime takes; a stand-in for one may name neither."""
        config = getattr(runtime, "config", None)
        size = self.image_size if config is None else config.visual.image_size
        return replace(self, image_size=size, background=getattr(runtime, "background", self.background))

    async def load(self, url: str, param: str) -> Picture:
        """The picture, decoded: once for all answers to a request, and its file is not kept. Refusal 400 at `param`."""
        content = await self._read(url.strip(), param)
        try:
            return await _DECODERS.decode(content, self.image_size, self.background, served_formats())
        except ImageError as error:
            raise invalid(param, str(error), code="bad_image") from None

    async def _read(self, url: str, param: str) -> bytes:
        found = _SCHEME.match(url)
        scheme = found[1].lower() if found else ""
        if scheme == "data" or is_base64(url):
            return await asyncio.to_thread(self._from_text, url, param)
        if scheme in ("http", "https"):
            if self.fetcher is None:
                raise invalid(
                    param,
                    "this server does not fetch images; send it as data:image/…;base64,… "
                    "(or start the server with --allowed-media-domains)",
                    code="fetch_not_allowed",
                )
            return await self.fetcher.fetch(url, param)
        if scheme in ("file", ""):
            return await asyncio.to_thread(self._from_file, url, param)
        raise invalid(
            param,
            "expected data:image/…;base64,… with the image in it, or an http, https or file URL",
            code="scheme_not_allowed",
        )

    def _from_text(self, url: str, param: str) -> bytes:
        """From a data URI or base64."""
        try:
            content = from_base64(url) if is_base64(url) else from_data_uri(url)
        except ImageError as error:
            raise invalid(param, str(error), code="bad_image") from None
        if len(content) > self.max_bytes:
            raise _too_large(param, self.max_bytes)
        return content

    def _from_file(self, url: str, param: str) -> bytes:
        """A file that is below `local_root` once links and `..` are resolved; one outside is reported as missing."""
        if self.local_root is None:
            raise invalid(
                param,
                "this server does not read local files; send the image as data:image/…;base64,… "
                "(or start the server with --allowed-local-media-path)",
                code="local_not_allowed",
            )
        missing = invalid(param, "there is no such file below --allowed-local-media-path", code="file_not_found")
        path = url
        if url[:5].lower() == "file:":
            parts = urlsplit(url)
            if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
                raise missing
            path = url2pathname(parts.path)
        try:
            root = self.local_root.resolve(strict=True)
            real = (root / path).resolve(strict=True)
            if not real.is_relative_to(root):
                raise missing
            descriptor = os.open(real, os.O_RDONLY | _FLAGS)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise missing
                with open(descriptor, "rb", closefd=False) as file:
                    content = file.read(self.max_bytes + 1)
            finally:  # by hand: of a folder, `open` makes no file that would close it
                os.close(descriptor)
        except (OSError, ValueError, RuntimeError):  # ValueError: a NUL in the path; RuntimeError: a loop of links
            raise missing from None
        if len(content) > self.max_bytes:
            raise _too_large(param, self.max_bytes)
        return content


def _too_large(param: str, limit: int) -> Refusal:
    return invalid(
        param, f"the image has more than {limit} bytes; shrink it (the model sees 448 x 448)", code="bad_image"
    )
