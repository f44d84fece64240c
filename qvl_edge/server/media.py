"""The URL of an image_url part -> the bytes of an image file that is safe to decode."""

import asyncio
import base64
import binascii
import io
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from qvl_edge.server.fetch import MAX_BYTES, Fetcher
from qvl_edge.server.refusal import Refusal, invalid
from qvl_edge.vision.image import FORMATS, MAX_PIXELS

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_DATA_URI = re.compile(r"data:(?:image/[a-z0-9.+-]{1,40})?;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Media:
    """Where images may come from: data URIs, and files below local_root and hosts of the fetcher if they are given."""

    local_root: Path | None = None
    fetcher: Fetcher | None = None
    max_bytes: int = MAX_BYTES  # of one image

    async def load(self, url: str, param: str) -> bytes:
        """The image file, whose header has been checked but which is not decoded. Refusal 400 at `param`."""
        found = _SCHEME.match(url)
        scheme = found[1].lower() if found else ""
        if scheme == "data":
            content = await asyncio.to_thread(self._from_data_uri, url, param)
        elif scheme in ("http", "https"):
            if self.fetcher is None:
                raise invalid(
                    param,
                    "this server does not fetch images; send it as data:image/…;base64,… "
                    "(or start the server with --allowed-media-domains)",
                    code="fetch_not_allowed",
                )
            content = await self.fetcher.fetch(url, param)
        elif scheme in ("file", ""):
            content = await asyncio.to_thread(self._from_file, url, param)
        else:
            raise invalid(param, "expected a data URI, or an http, https or file URL", code="scheme_not_allowed")
        await asyncio.to_thread(check_header, content, param)
        return content

    def _from_data_uri(self, url: str, param: str) -> bytes:
        head = _DATA_URI.match(url)
        if head is None:
            raise invalid(
                param, "a data URI must begin with data:image/png;base64, (or jpeg, webp …)", code="bad_image"
            )
        if (len(url) - head.end()) * 3 // 4 > self.max_bytes + 2:
            raise _too_large(param, self.max_bytes)
        try:
            return base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise invalid(param, "the data URI is not valid base64", code="bad_image") from None

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
            path = unquote(parts.path)
        try:
            root = self.local_root.resolve(strict=True)
            real = (root / path).resolve(strict=True)
            if not real.is_relative_to(root):
                raise missing
            # NOFOLLOW: it may have become a link since; NONBLOCK: opening a pipe would wait for a writer
            descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # before open(), which would leave a folder's open
                os.close(descriptor)
                raise missing
            with open(descriptor, "rb") as file:
                content = file.read(self.max_bytes + 1)
        except (OSError, ValueError, RuntimeError):  # ValueError: a NUL in the path; RuntimeError: a loop of links
            raise missing from None
        if len(content) > self.max_bytes:
            raise _too_large(param, self.max_bytes)
        return content


def check_header(content: bytes, param: str) -> None:
    """Refusal 400 unless `content` has the header of one of FORMATS with at most MAX_PIXELS; nothing is decoded."""
    accepted = f"accepted are {', '.join(FORMATS)}"
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise invalid(param, f"the image has more than {MAX_PIXELS / 1e6:.0f} Mpixel", code="bad_image") from None
    except Exception:  # PIL raises many types on damaged files
        raise invalid(param, f"this is not an image that can be read; {accepted}", code="bad_image") from None
    if width * height > MAX_PIXELS:
        size = f"{width} x {height} = {width * height / 1e6:.1f} Mpixel"
        raise invalid(param, f"the image is {size}, at most {MAX_PIXELS / 1e6:.0f} are decoded", code="bad_image")


def _too_large(param: str, limit: int) -> Refusal:
    return invalid(
        param, f"the image has more than {limit} bytes; shrink it (the model sees 448 x 448)", code="bad_image"
    )
