"""Pictures decoded in processes of their own, with limits of time and memory: decoders are C and read hostile files.

A process costs 0.3 s to start, once, and 45 MB; nothing of a large picture stays in it.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from PIL import Image

from qvl_edge import child
from qvl_edge.errors import ImageError, OutOfMemory
from qvl_edge.vision.image import Frame, Picture, load_frame, load_picture

QUICK_S, LIMIT_S = 3.0, 20.0  # for one picture; 64 Mpixel of PNG take 2 s, a JPEG of as many in 16 scans 12
QUICK_PIXELS = 16_000_000  # a larger picture waits behind the other large ones and never before a photo
MAX_BYTES = 2 << 30  # of a process's address space; 64 Mpixel with transparency take 0.6 GB


class _Slow(Exception):
    """A picture is not one for the quick decoders."""


class Decoders:
    """Two quick decoders and one for what takes long, so that nobody's large pictures delay a small one.

    So at most 2 x QUICK_PIXELS + MAX_PIXELS are decoded at once, whoever asks; other pictures wait as their files.

    A process is started when it is first needed, and again after one that was killed.
    """

    def __init__(self) -> None:
        self._quick = ThreadPoolExecutor(2, thread_name_prefix="qvl-edge-decode")
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="qvl-edge-decode-large")
        self._local = threading.local()  # each thread has its process

    async def decode(self, content: bytes, image_size: int, background: str, accepted: Sequence[str]) -> Picture:
        """As load_picture of these bytes. ImageError also for what takes too long; OutOfMemory."""
        loop = asyncio.get_running_loop()  # a picture that waits takes no thread, and leaves when it is cancelled
        job = {"image_size": image_size, "background": background, "accepted": list(accepted), "bytes": len(content)}

        async def on(pool: Executor, limit_s: float, most_pixels: int | None) -> Picture:
            return await loop.run_in_executor(pool, self._run, {**job, "most_pixels": most_pixels}, content, limit_s)

        try:
            return await on(self._quick, QUICK_S, QUICK_PIXELS)
        except _Slow:
            pass
        try:
            return await on(self._slow, LIMIT_S, None)
        except _Slow:
            words = (
                f"the image takes more than {LIMIT_S:g} s or {MAX_BYTES >> 20} MiB to decode; save it as a plain JPEG"
            )
            raise ImageError(words) from None

    def _run(self, job: dict[str, object], content: bytes, limit_s: float) -> Picture:
        process = self._process()
        there: Any = process.stdin  # text, over bytes
        back: Any = process.stdout
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        try:
            there.buffer.write(json.dumps(job).encode() + b"\n")
            there.buffer.write(content)
            there.buffer.flush()
            said = json.loads(back.buffer.readline())
            size = int(said.get("size", 0))
            square = back.buffer.read(3 * size * size)
            if size:
                return Picture(Image.frombytes("RGB", (size, size), square), Frame(*said["frame"]))
        except (OSError, ValueError):  # it was killed, or its memory was not enough even to say so
            process.kill()
            raise _Slow from None
        finally:
            timer.cancel()
        if said["kind"] == "slow":
            raise _Slow
        if said["kind"] == "memory":
            raise OutOfMemory("there is no memory to decode the image now; send a smaller one, or try later")
        raise ImageError(said["error"])

    def _process(self) -> "subprocess.Popen[str]":
        process: subprocess.Popen[str] | None = getattr(self._local, "process", None)
        if process is None or process.poll() is not None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            if process is not None:
                with contextlib.suppress(OSError), process:  # what it has not read is lost with it
                    pass
            try:
                # its own session: Ctrl-C is the server's; the end of the pipe ends it
                group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # the same on Windows
                process = child.start(
                    __name__, start_new_session=True, creationflags=group, stderr=subprocess.DEVNULL, **pipes
                )
            except OSError as error:
                raise OutOfMemory(
                    f"no process can be started to decode the image ({error.strerror}); try later"
                ) from None
            self._local.process = process
        return process


def main() -> None:
    """Decode pictures, one after the other: a line of JSON and the file in; a line of JSON and the square out."""
    child.limit(MAX_BYTES)
    while line := sys.stdin.buffer.readline():
        job = json.loads(line)
        content = sys.stdin.buffer.read(job["bytes"])
        square = b""
        said: dict[str, Any]
        try:
            frame = load_frame(content, job["accepted"])
            if job["most_pixels"] is not None and frame.width * frame.height > job["most_pixels"]:
                said = {"kind": "slow"}
            else:
                picture = load_picture(
                    content, job["image_size"], background=job["background"], accepted=job["accepted"]
                )
                square = picture.square.tobytes()
                said = {"size": picture.square.width, "frame": picture.frame}
        except ImageError as error:
            said = {"kind": "image", "error": str(error)}
        except MemoryError:
            said = {"kind": "memory"}
        sys.stdout.buffer.write(json.dumps(said).encode() + b"\n" + square)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
