"""Pictures that cost more than they weigh."""

import asyncio
import gc
import io
import threading
import weakref

import pytest
from PIL import Image

from qvl_edge import child
from qvl_edge.engine.worker import Worker
from qvl_edge.errors import ImageError
from qvl_edge.server.media import Media
from qvl_edge.server.settings import Limits
from qvl_edge.vision import decoder
from qvl_edge.vision.decoder import Decoders
from qvl_edge.vision.image import MAX_PIXELS, Picture, load_picture

from ..harness import ScriptedWorker, data_uri, picture, serving, text, until

pytestmark = pytest.mark.slow
FORMATS = ("PNG", "JPEG", "GIF")


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scans(count: int) -> bytes:
    """A progressive JPEG of 16 Mpixel whose last scan comes `count` times."""
    content = file_of(Image.new("RGB", (4000, 4000), "red"), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * count + content[-2:]


def decoded(decoders: Decoders, *given) -> Picture:
    return asyncio.run(decoders.decode(*given))


@pytest.fixture(scope="module")
def decoders() -> Decoders:
    return Decoders()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "1", "L", "P"])
def test_a_process_decodes_to_the_last_bit_as_this_one(decoders: Decoders, mode: str) -> None:
    content = file_of(Image.effect_noise((300, 200), 90).convert(mode))
    said, expected = decoded(decoders, content, 448, "white", FORMATS), load_picture(content, 448)
    assert said.frame == expected.frame and said.square.tobytes() == expected.square.tobytes()
    with pytest.raises(ImageError, match="damaged or cut"):
        decoded(decoders, content[: len(content) // 2], 448, "white", FORMATS)
    with pytest.raises(ImageError, match="not accepted"):
        decoded(decoders, content, 448, "white", ("JPEG",))


@pytest.mark.parametrize("count", [100, 1000])
def test_scans_without_end_are_refused_before_they_are_decoded(decoders: Decoders, count: int) -> None:
    with pytest.raises(ImageError, match="scans"):
        decoded(decoders, scans(count), 448, "white", FORMATS)


@pytest.mark.parametrize("ends", ["late", "killed"])
def test_a_decoder_that_takes_too_long_or_dies_is_no_loss_to_the_next_picture(
    monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    mine, small = Decoders(), file_of(Image.new("RGB", (3, 3)))
    with monkeypatch.context() as short:
        if ends == "late":
            short.setattr(decoder, "LIMIT_S", 0.1)
            content = file_of(Image.new("RGB", (7000, 7000)))
        else:
            start, content = child.start, small
            short.setattr(child, "start", lambda *a, **options: killed(start(*a, **options)))
        with pytest.raises(ImageError, match="to decode; save it as a plain JPEG"):
            decoded(mine, content, 448, "white", FORMATS)
    for _ in range(3):
        assert decoded(mine, small, 448, "white", FORMATS).frame.size == (3, 3)


def killed(process):
    process.kill()
    return process


def test_over_all_requests_few_pixels_are_decoded_at_once_and_a_small_picture_waits_for_no_large_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = Decoders()
    release, run, lock = threading.Event(), mine._run, threading.Lock()
    pixels, most, begun = 0, 0, threading.Semaphore(0)

    def slowly(job: dict, content: bytes, limit_s: float):
        nonlocal pixels, most
        mine_now = job["most_pixels"] or MAX_PIXELS
        with lock:
            pixels += mine_now
            most = max(most, pixels)
        if job["most_pixels"] is None:
            begun.release()
            release.wait(30)
        try:
            return run(job, content, limit_s)
        finally:
            with lock:
                pixels -= mine_now

    monkeypatch.setattr(mine, "_run", slowly)
    large, small = file_of(Image.new("1", (5000, 5000))), file_of(Image.new("RGB", (3, 3)))

    async def crowd() -> None:
        def one(content: bytes) -> asyncio.Task:
            return asyncio.ensure_future(mine.decode(content, 448, "white", FORMATS))

        waiting = [one(large) for _ in range(6)]
        assert await asyncio.to_thread(begun.acquire, timeout=30)
        assert all([(await one(small)).frame.size == (3, 3) for _ in range(3)])
        assert not begun.acquire(blocking=False)  # one large one at a time
        waiting.pop().cancel()  # its caller has left: it is not decoded
        release.set()
        assert all([(await each).frame.size == (5000, 5000) for each in waiting])

    asyncio.run(crowd())
    assert sum(begun.acquire(blocking=False) for _ in range(9)) == 4
    assert most <= 2 * decoder.QUICK_PIXELS + MAX_PIXELS


def test_a_request_has_a_budget_of_pixels_and_the_server_decodes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = picture(data_uri(Image.new("1", (1000, 1000))))
    with serving(ScriptedWorker("x"), limits=Limits(pixels=2_500_000)) as server:
        assert server.ask([shown] * 2).status_code == 200
        refused = server.ask([shown] * 3)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "too_many_pixels"


def test_nothing_of_a_picture_is_kept_but_its_square_and_no_cycle_keeps_that(runtime, monkeypatch) -> None:
    squares: list[weakref.ref] = []
    load = Media.load

    async def watched(self, url: str, param: str):
        loaded = await load(self, url, param)
        assert loaded.square.size == (448, 448)
        squares.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(Media, "load", watched)
    with serving(Worker(runtime)) as server:
        gc.collect()
        gc.disable()
        try:
            shown = picture(data_uri(Image.new("1", (3000, 3000))))
            for more, stream, status in (
                (text("a"), False, 200),
                (text("a"), True, 200),
                (text("a " * 9000), False, 400),  # found by the engine
                (text("a " * 9000), True, 400),
                (picture("data:,x"), False, 400),  # found while the request is read
            ):
                assert server.ask([shown, more], n=4, max_tokens=3, stream=stream).status_code == status
            assert len(squares) == 5
            until(lambda: all(one() is None for one in squares))
        finally:
            gc.enable()


def test_pictures_in_another_order_of_requests_stay_their_own() -> None:
    async def many() -> list[tuple[int, int]]:
        urls = [data_uri(Image.new("RGB", (side, 7))) for side in range(1, 30)]
        return [one.frame.size for one in await asyncio.gather(*(Media().load(url, "p") for url in urls))]

    assert asyncio.run(many()) == [(side, 7) for side in range(1, 30)]
