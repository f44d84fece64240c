"""The page in a real browser (headless Chromium): what a user does, and what it must never do."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pytest import approx

from qvl_edge.demo.scenes import Scene
from qvl_edge.engine.request import Piece
from qvl_edge.labels import Labelled, to_coco
from qvl_edge.memory import Memory
from qvl_edge.runtime import Runtime
from qvl_edge.text.boxes import parse_boxes
from qvl_edge.text.prompt import Message

from .harness import ScriptedWorker, Server, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium here (apt-get install chromium)", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.slow

SIZE = {"width": 1240, "height": 900}
FIRST_COLOUR = (230, 25, 75)  # the first of the palette
DONE = ".answer[aria-busy=false]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield started
        started.close()


@contextlib.contextmanager
def opened(browser: Any, **options: Any) -> Iterator[Any]:
    """A page in a browser of its own; whatever it complains about fails the test."""
    given = {"locale": "en-US", "viewport": SIZE, "permissions": ["clipboard-read", "clipboard-write"], **options}
    context = browser.new_context(**given)
    page = context.new_page()
    page.set_default_timeout(15_000)
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: page.complaints.append(dialog.message))
    page.on("console", lambda said: page.complaints.append(said.text) if "status of 4" not in said.text else None)
    yield page
    context.close()
    assert not page.complaints


@pytest.fixture
def fresh(browser: Any) -> Iterator[Any]:
    """A page that has not been anywhere."""
    with opened(browser) as page:
        yield page


def begin(page: Any) -> Any:
    """The page with an empty conversation: loading it again takes longer than most tests."""
    page.set_viewport_size(SIZE)
    page.keyboard.press("Escape")  # a large view that a failed test left open
    page.click("#new")
    page.wait_for_selector("#welcome")
    return page


@pytest.fixture(scope="module")
def visited(browser: Any, server: Server) -> Iterator[Any]:
    with opened(browser) as page:
        visit(page, server)
        yield page


@pytest.fixture
def page(visited: Any) -> Iterator[Any]:
    """The page of the small model."""
    yield begin(visited)
    assert not visited.complaints


@pytest.fixture(scope="module")
def scripted(browser: Any) -> Iterator[tuple[Any, ScriptedWorker, Server]]:
    engine = ScriptedWorker()
    with serving(engine) as server, opened(browser) as page:
        visit(page, server)
        yield page, engine, server


@pytest.fixture
def script(scripted: Any) -> Iterator[tuple[Any, ScriptedWorker]]:
    """A page whose answers are `engine.pieces`."""
    page, engine, _ = scripted
    engine.pieces, engine.before = [Piece("fine")], None
    engine.requests.clear()
    engine.cancelled.clear()
    yield begin(page), engine
    assert not page.complaints


def says(engine: ScriptedWorker, *pieces: str) -> None:
    """Let the next answers be these pieces."""
    engine.pieces = [Piece(piece) for piece in pieces]


@pytest.fixture
def files(scenes: list[Scene], tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"scene{index}.png" for index in range(len(scenes))]
    for path, scene in zip(paths, scenes, strict=True):
        scene.image.resize((640, 400)).save(path)
    return paths


def pictures_of(message: Message) -> list[Any]:
    """The pictures of a user's message, as the server opened them."""
    return [part["image"] for part in message.content if "image" in part]


def visit(page: Any, server: Server) -> None:
    page.goto(server.url)
    shows(page, "#model", "small")


def shows(page: Any, selector: str, words: str) -> None:
    """Wait until the element has this text."""
    playwright.expect(page.locator(selector)).to_have_text(words, timeout=15_000)


def ask(page: Any, words: str, *images: Path, answers: int = 1) -> None:
    """Ask, and wait for the last of so many answers; 0: do not wait."""
    if images:
        page.set_input_files("#files", images)
        page.wait_for_selector(f"#pictures li:nth-child({len(images)})")
    page.fill("#question", words)
    page.click("#send")
    if answers:
        page.wait_for_selector(f"{DONE} >> nth={answers - 1}")


def check_frames(page: Any, boxes: list[dict[str, Any]], size: tuple[int, int]) -> list[list[float]]:
    """Each polygon of the last answer lies where its box is, to half a CSS pixel; their x, y, width, height."""
    stage = page.locator(".answer").last.locator(".stage:has(polygon)")
    stage.scroll_into_view_if_needed()
    picture = stage.locator("img").bounding_box()
    assert picture["width"] / picture["height"] == approx(size[0] / size[1], rel=0.01)
    found = stage.locator("polygon").evaluate_all("all => all.map(one => one.getBoundingClientRect().toJSON())")
    scale = picture["width"] / size[0]
    expected = sorted(
        [picture["x"] + x1 * scale, picture["y"] + y1 * scale, (x2 - x1) * scale, (y2 - y1) * scale]
        for x1, y1, x2, y2 in (box["pixels"] for box in boxes)
    )
    for frame, at in zip(
        sorted([one[k] for k in ("x", "y", "width", "height")] for one in found), expected, strict=True
    ):
        assert frame == approx(at, abs=0.5)
    return expected


def test_two_pictures_a_question_and_frames_where_the_boxes_are(page, runtime: Runtime, files, tmp_path: Path) -> None:
    ask(page, "Find the black circle.", files[0], files[2])
    boxes = [box.to_dict() for box in runtime.ask([files[0], files[2]], "Find the black circle.").boxes]
    assert boxes and {box["image"] for box in boxes} == {1}
    (x, y, _, height), *_ = check_frames(page, boxes, (640, 400))
    assert page.locator(".asked img").count() == 2
    assert page.locator(".answer img").evaluate_all("all => all.map(one => one.alt)") == ["scene0.png", "scene2.png"]
    first, second = (page.locator(".answer .stage").nth(index).bounding_box() for index in (0, 1))
    assert first["y"] == second["y"] and first["x"] + first["width"] < second["x"]  # side by side
    label = page.locator(".answer .stage .name").first.text_content()
    assert label == boxes[0]["label"] and label in page.locator(".said").text_content()
    assert "<box>" not in page.locator(".said").text_content()
    # the frame is there in the picture's pixels too
    assert pixel(page, tmp_path, x, y + height / 2) == FIRST_COLOUR  # wholly within a line of 3 pixels around x
    # memory and speed as the server and the clock have them
    assert re.fullmatch(r"Memory \d+\.\d GB", page.text_content("#memory"))
    assert re.search(r"\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s", page.text_content(".tools"))


def test_phrases_frames_and_the_list_of_boxes_light_one_another(page, files) -> None:
    ask(page, "Describe the picture with boxes.", files[0])
    phrases, rows, lit = page.locator(".phrase"), page.locator(".boxes li button"), page.locator("polygon.lit")
    assert phrases.count() == rows.count() == 2
    colours = phrases.evaluate_all("all => all.map(one => one.style.getPropertyValue('--colour'))")
    assert len(set(colours)) == 2
    phrases.nth(1).hover()
    assert lit.get_attribute("data-name") == phrases.nth(1).text_content()
    assert page.locator("polygon:not(.lit)").count() == 1
    page.locator("polygon").first.hover()
    name = lit.get_attribute("data-name")
    assert page.locator(".phrase.lit").text_content() == page.locator(".boxes .lit b").text_content() == name
    for node in (phrases.first, rows.first):  # by keyboard, as by mouse
        node.focus()
        assert lit.get_attribute("data-name") == phrases.first.text_content()


def test_boxes_of_one_name_light_up_alone_and_leave_as_json_and_coco(script, tmp_path: Path) -> None:
    page, engine = script
    text = (
        "<ref>cat</ref><box>(0,0),(99,99)</box><box>(500,500),(900,900)</box><quad>(1,2),(9,4),(300,60),(70,80)</quad>"
    )
    Image.new("RGB", (100, 50)).save(
        tmp_path / "cats.png"
    )  # the size that the scripted worker takes all pictures to have
    says(engine, text)
    ask(page, "q", tmp_path / "cats.png")
    page.locator(".boxes li button").nth(1).hover()
    assert page.locator("polygon.lit").count() == page.locator(".phrase.lit").count() == 1
    page.locator(".phrase").first.hover()
    assert page.locator("polygon.lit").count() == 3
    boxes = parse_boxes(text, image_sizes=[(100, 50)])
    for kind, expected in (
        ("json", [box.to_dict() for box in boxes]),
        ("coco", to_coco([Labelled("cats.png", 100, 50, boxes)])),
    ):
        page.click(f".boxes .{kind}")
        shows(page, f".boxes .{kind}", "Copied")
        assert json.loads(page.evaluate("navigator.clipboard.readText()")) == expected


def test_a_follow_up_in_chinese_sees_the_earlier_turn(page, runtime: Runtime, files) -> None:
    page.click("#language")
    assert page.locator("html").get_attribute("lang") == "zh-CN" and page.locator("#send").text_content() == "发送"
    ask(page, "有几个图形？", files[0])
    ask(page, "框出红色菱形。", answers=2)
    page.click("#language")
    first = [{"image": files[0].read_bytes()}, {"text": "有几个图形？"}]
    counted = runtime.answer(first)
    found = runtime.answer([{"text": "框出红色菱形。"}], [(first, counted.text)])
    assert page.locator(".said").first.text_content() == counted.text
    assert page.locator(".answer").last.locator(".phrase").all_text_contents() == [box.label for box in found.boxes]
    check_frames(page, [box.to_dict() for box in found.boxes], (640, 400))


def pixel(page: Any, folder: Path, x: float, y: float) -> tuple[int, ...]:
    """The colour on the screen at a place."""
    page.screenshot(path=folder / "shot.png")
    return Image.open(folder / "shot.png").convert("RGB").getpixel((int(x), int(y)))


@pytest.fixture
def quarters(tmp_path: Path) -> Path:
    """A picture of four colours."""
    picture = Image.new("RGB", (400, 300), "white")
    for colour, corner in (("red", (0, 0)), ("lime", (200, 0)), ("blue", (0, 150))):
        picture.paste(colour, (*corner, corner[0] + 200, corner[1] + 150))
    picture.save(tmp_path / "quarters.png")
    return tmp_path / "quarters.png"


def test_a_picture_opens_large_zooms_and_moves(script, quarters: Path, tmp_path: Path) -> None:
    page, _ = script
    ask(page, "q", quarters)
    page.click(".asked .stage")
    room, picture = page.locator("#view-room"), page.locator("#view-room .stage")
    space, whole = room.bounding_box(), picture.bounding_box()
    assert whole["width"] > 400 and (space["height"] - whole["height"] < 1 or space["width"] - whole["width"] < 1)
    middle = space["x"] + space["width"] / 2, space["y"] + space["height"] / 2
    corner = whole["x"] + 0.4 * whole["width"], whole["y"] + 0.4 * whole["height"]
    assert pixel(page, tmp_path, *corner) == (255, 0, 0)
    page.mouse.move(*corner)
    page.mouse.wheel(0, -700)  # what is under the pointer stays there
    page.wait_for_function(
        "document.querySelector('#view-room .stage').clientWidth > 2 * document.querySelector('#view-room').clientWidth"
    )
    zoomed = picture.bounding_box()
    assert (corner[0] - zoomed["x"]) / zoomed["width"] == approx(0.4, abs=2e-3)
    assert pixel(page, tmp_path, *corner) == pixel(page, tmp_path, space["x"] + 5, space["y"] + 5) == (255, 0, 0)
    page.mouse.down()
    page.mouse.move(corner[0] - zoomed["width"] * 0.3, corner[1])
    page.mouse.up()
    assert picture.bounding_box()["x"] == approx(zoomed["x"] - zoomed["width"] * 0.3, abs=1)
    assert pixel(page, tmp_path, *corner) == (0, 255, 0)
    page.keyboard.press("0")
    assert picture.bounding_box() == approx(whole)
    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    assert picture.bounding_box()["width"] == approx(whole["width"] * 1.4, rel=1e-3)
    page.click("#view-fit")
    fingers = page.context.new_cdp_session(page)
    for kind, apart in (("touchStart", 40), ("touchMove", 60), ("touchMove", 120), ("touchEnd", None)):
        points = [] if apart is None else [{"x": middle[0] + way * apart, "y": middle[1], "id": way} for way in (1, -1)]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    assert picture.bounding_box()["width"] == approx(whole["width"] * 3, rel=0.02)
    assert pixel(page, tmp_path, middle[0] - 20, middle[1] - 20) == (255, 0, 0)
    page.keyboard.press("Escape")
    assert room.is_hidden()


def test_a_dragged_region_is_a_box_in_the_question(script, quarters: Path, files, tmp_path: Path) -> None:
    page, engine = script
    page.set_input_files("#files", [files[0], quarters])
    page.click("#pictures li:nth-child(2) .thumb")
    picture = page.locator("#view-room .stage").bounding_box()
    place = [
        (picture["x"] + x * picture["width"], picture["y"] + y * picture["height"]) for x, y in ((0.8, 0.6), (0.1, 0.2))
    ]
    page.mouse.move(*place[0])
    page.mouse.down()
    page.mouse.move(*place[1])
    assert pixel(page, tmp_path, (place[0][0] + place[1][0]) / 2, place[1][1]) != (255, 0, 0)  # the dashed line
    page.mouse.up()
    asked = page.input_value("#question")
    number, *corners = map(
        int, re.fullmatch(r"Picture (\d) <box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box> ", asked).groups()
    )
    assert number == 2 and corners == approx([100, 200, 800, 600], abs=3)
    page.keyboard.type("What is here?")
    page.click("#pictures li:nth-child(1) .thumb")  # by keyboard: from the middle up, then smaller
    for key in ("ArrowUp", "Shift+ArrowLeft", "Enter"):
        page.keyboard.press(key)
    asked += "What is here? Picture 1 <box>(250,230),(730,730)</box>"
    assert page.input_value("#question").strip() == asked
    page.click("#send")
    page.wait_for_selector(DONE)
    assert engine.requests[0].messages[-1].content[-1] == {"text": asked}
    for index, (x1, y1) in enumerate(((0.25, 0.23), (corners[0] / 1000, corners[1] / 1000))):
        stage = page.locator(".asked .stage").nth(index)
        frame, whole = stage.locator("polygon").bounding_box(), stage.bounding_box()
        assert (frame["x"] - whole["x"]) / whole["width"] == approx(x1, abs=0.02)
        assert (frame["y"] - whole["y"]) / whole["height"] == approx(y1, abs=0.02)


class Gate:
    """Holds back the pieces of a ScriptedWorker after the first until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def __call__(self, index: int) -> Any:
        async def wait() -> None:
            while not self.opened.is_set():
                await asyncio.sleep(0.005)

        return wait() if index else None


def test_the_answer_grows_stops_is_no_history_and_is_made_again(script) -> None:
    page, engine = script
    engine.before = gate = Gate()
    says(engine, "One ", "<ref>th", "ing</ref><box>(0,0),(9,9)</box> more")
    ask(page, "go", answers=0)
    shows(page, ".said", "One ")
    assert page.locator("#send").is_hidden() and page.locator(".answer").get_attribute("aria-busy") == "true"
    page.click("#stop")
    page.wait_for_selector(DONE)
    assert engine.cancelled.wait(10)
    tools = page.locator(".tools").text_content()
    assert "stopped" in tools and "broken off" in tools and page.locator("#send").is_visible()
    gate.opened.set()
    ask(page, "two", answers=2)
    page.click(".again")
    shows(page, ".said >> nth=1", "One thing more")
    page.wait_for_selector(f"{DONE} >> nth=1")
    assert page.locator(".answer").count() == 2 and "3 tokens" in page.locator(".tools").last.text_content()
    assert [len(request.messages) for request in engine.requests] == [1, 1, 1]
    engine.before = Gate()
    titles = page.locator("#chat-list .enter").all_text_contents()
    ask(page, "three", answers=0)
    shows(page, ".said >> nth=2", "One ")
    engine.cancelled.clear()
    page.locator("#chat-list li:has([aria-current]) .remove").click()  # while it is answered
    assert engine.cancelled.wait(10) and page.locator("#welcome").is_visible()
    playwright.expect(page.locator("#chat-list .enter")).to_have_text(titles[1:])


def test_the_memory_of_a_gpu_is_shown(script, monkeypatch: pytest.MonkeyPatch) -> None:
    page, engine = script
    monkeypatch.setattr(engine, "device", torch.device("cuda"))
    monkeypatch.setattr("qvl_edge.server.app.device_memory", lambda device: Memory(12 * 10**9, 48 * 10**8))
    ask(page, "q")
    shows(page, "#memory", "GPU 7.2 / 12.0 GB")


def test_what_the_model_and_the_user_write_is_never_html(script) -> None:
    page, engine = script
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script><b>b</b><ref><i>l</i></ref> <svg onload=alert(3)>"
    says(engine, evil)
    ask(page, evil)
    for place in (".asked p", ".said"):
        assert page.locator(place).text_content() == evil.replace("<ref>", "").replace("</ref>", "")
    title = page.get_attribute("#chat-list [aria-current]", "title")
    assert title == evil.replace("<ref>", "").replace("</ref>", "")[:100]
    assert page.locator(":is(#log, #chat-list) :is(script, b, i, svg, img)").count() == 0


def test_errors_are_shown_in_the_readers_language_and_the_next_question_works(script) -> None:
    page, _ = script
    path = "**/v1/chat/completions"
    page.route(path, lambda route: route.fulfill(status=200, body=ERROR_STREAM))
    ask(page, "one")
    shows(page, ".answer .problem", "no memory")
    page.unroute(path)
    page.route(path, lambda route: route.fulfill(status=429, json={"error": {"message": "full", "code": "queue_full"}}))
    page.click("#language")
    ask(page, "two", answers=2)
    page.click("#language")
    shows(page, ".answer .problem >> nth=1", "服务器正忙，请稍后重试（full）")
    page.unroute(path)
    page.evaluate("() => { opens = IDBFactory.prototype.open; IDBFactory.prototype.open = () => { throw 'full' } }")
    ask(page, "three", answers=3)
    shows(page, ".said >> nth=2", "fine")
    shows(page, "#status", "This browser has no room to keep the conversation; export it.")
    page.evaluate("() => { IDBFactory.prototype.open = opens }")


ERROR_STREAM = 'data: {"error": {"message": "no memory"}}\n\ndata: [DONE]\n\n'


def test_a_server_with_a_key_asks_for_it_and_keeps_it_for_the_tab_only(fresh) -> None:
    page = fresh
    with serving(ScriptedWorker("hello"), key="sesame") as server:
        page.goto(server.url)
        page.wait_for_selector("#panel[open]")
        assert page.locator("#key-note").is_visible()
        page.fill("#key", "sesame")
        page.keyboard.press("Enter")
        shows(page, "#model", "small")
        ask(page, "hi")
        page.reload()
        shows(page, "#model", "small")
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
        shows(page, ".said", "hello")  # the conversation stays, the key of another tab does not


def test_settings_language_theme_and_the_conversations_survive_a_reload(fresh, files) -> None:
    page, engine = fresh, ScriptedWorker("<ref>it</ref><box>(100,100),(500,500)</box>")
    with serving(engine) as server:
        visit(page, server)
        page.click("#settings")
        for name, value in (("temperature", "0"), ("seed", "7"), ("max_tokens", "9"), ("system", "Be brief.")):
            page.fill(f"[name={name}]", value)
        page.click("#panel .main")
        page.click("#theme")
        ask(page, "first", *files[:2])
        assert "Picture 2: scene1.png" in page.locator("figcaption").last.text_content()
        page.click(".move")
        check_frames(page, [{"pixels": (64, 40, 320, 200)}], (640, 400))
        page.click("#new")
        ask(page, "second")
        page.click("#language")
        page.reload()
        visit(page, server)
        assert page.locator("html").get_attribute("data-theme") == "dark"
        assert page.locator("html").get_attribute("lang") == "zh-CN"
        titles = page.locator("#chat-list .enter")
        playwright.expect(titles).to_have_text(["second", "first"])
        shows(page, ".asked p", "second")
        titles.nth(1).click()
        shows(page, ".phrase", "it")
        check_frames(page, [{"pixels": (64, 40, 320, 200)}], (640, 400))
        page.locator("#chat-list .remove").nth(1).click()
        playwright.expect(titles).to_have_text(["second"])
        assert page.locator("#welcome").is_visible()
        page.click("#status button")  # undo
        playwright.expect(titles).to_have_text(["second", "first"])
        page.click(".edit")
        assert page.locator(".answer").count() == 0 and page.input_value("#question") == "first"
        assert page.locator("#pictures img").count() == 2
    assert engine.requests[0].generation == {"temperature": 0.0, "seed": 7, "max_new_tokens": 9}
    assert [len(request.messages) for request in engine.requests] == [2, 2]  # each conversation by itself
    assert engine.requests[0].messages[0] == Message("system", "Be brief.")


def test_pictures_are_pasted_dropped_and_taken_away_and_other_files_are_named(script, quarters) -> None:
    page, _ = script
    give = """([kind, holder, bytes, name, type]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
        const make = kind === "paste" ? ClipboardEvent : DragEvent;
        dispatchEvent(new make(kind, { [holder]: transfer, cancelable: true }));
    }"""
    image = list(quarters.read_bytes())
    for kind, holder in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        page.evaluate(give, [kind, holder, image, f"{kind}.png", "image/png"])
        page.wait_for_selector(f"#pictures img[alt='{kind}.png']")
    page.click("#pictures li:first-child .remove")
    assert page.locator("#pictures img").evaluate_all("all => all.map(one => one.alt)") == ["drop.png"]
    page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    shows(page, "#status", "a.png is not a picture that can be shown in this browser; save it as JPEG or PNG.")
    page.evaluate(give, ["drop", "dataTransfer", [1], "paper.pdf", "application/pdf"])
    shows(page, "#status", "paper.pdf is not a picture that can be shown in this browser; save it as JPEG or PNG.")
    page.click("#pictures .remove")


def test_what_is_shown_is_what_the_model_gets(script, tmp_path: Path) -> None:
    page, engine = script
    tags = Image.Exif()
    tags[0x112] = 6
    photo, drawing, big = tmp_path / "photo.jpg", tmp_path / "drawing.svg", tmp_path / "big.png"
    Image.new("RGB", (80, 40), "red").save(photo, exif=tags)
    drawing.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="30" height="20"><rect width="9" height="9"/></svg>'
    )
    Image.new("RGBA", (5000, 4000), (9, 9, 9, 0)).save(big)
    ask(page, "a", photo, drawing, big)
    sizes = page.locator(".asked img").evaluate_all("all => all.map(one => [one.naturalWidth, one.naturalHeight])")
    pictures = pictures_of(engine.requests[0].messages[-1])
    assert [picture.frame for picture in pictures] == [(*size, False) for size in sizes]
    assert sizes[:2] == [[40, 80], [30, 20]] and sizes[2][0] / sizes[2][1] == approx(5 / 4, abs=1e-3)
    assert sizes[2][0] * sizes[2][1] <= 16_000_000 and pictures[2].square.getpixel((9, 9)) == (255, 255, 255)
    assert pictures[1].square.getpixel((9, 9)) == (0, 0, 0)  # the black corner of the drawing
    assert pictures[1].square.getpixel((400, 400)) == (255, 255, 255)


def test_the_conversation_and_the_picture_with_its_frames_are_saved(page, server: Server, files) -> None:
    ask(page, "Find the red diamond.", files[0])
    with page.expect_download() as saved:
        page.click("#export")
    whole = json.loads(Path(saved.value.path()).read_text())
    (box,) = whole["messages"][1]["boxes"]
    assert [message["role"] for message in whole["messages"]] == ["user", "assistant"]
    again = server.post({"model": whole["model"], "messages": [*whole["messages"], whole["messages"][0]]})
    assert again.status_code == 200  # what was exported is what the API takes
    with page.expect_download() as saved:
        page.click(".save")
    picture = Image.open(saved.value.path()).convert("RGB")
    x1, y1, x2, y2 = box["pixels"]
    assert picture.size == (640, 400) and picture.getpixel((x2, (y1 + y2) // 2)) == FIRST_COLOUR


def test_a_phone_photo_is_sent_small_and_the_seventeenth_picture_drops_the_oldest_turn(script, tmp_path: Path) -> None:
    page, engine = script
    photo, other = tmp_path / "photo.jpg", tmp_path / "other.png"
    Image.effect_noise((4032, 3024), 90).convert("RGB").save(photo)
    Image.new("RGB", (40, 30)).save(other)
    bodies = list[int]()
    page.on("request", lambda sent: bodies.append(len(sent.post_data or "")))
    ask(page, "a", photo, *[other] * 8)
    ask(page, "b", *[other] * 9, answers=2)
    assert page.locator(".answer .problem").count() == 0
    assert [len(pictures_of(request.messages[-1])) for request in engine.requests] == [9, 9]
    assert [len(request.messages) for request in engine.requests] == [1, 1]
    assert max(bodies) < 3_000_000  # of noise, the worst case: the file as it is has 8 MB
    assert pictures_of(engine.requests[0].messages[0])[0].frame.size == (1600, 1200)


def test_it_fits_every_width_and_everything_has_a_name(page, files) -> None:
    ask(page, "Find the red diamond. " + "W" * 200, files[0])
    for width in (1000, 390, 320):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.querySelector('main').scrollWidth") <= width
    for shown in (False, True, False):  # the list lies over the page; a click beside it takes it away
        playwright.expect(page.locator("#chats")).to_be_visible(visible=shown)
        assert page.get_attribute("#chats-toggle", "aria-expanded") == str(shown).lower()
        page.click("main", position={"x": 312, "y": 250}) if shown else page.click("#chats-toggle")
    page.click("#chats-toggle")
    for opener in ("#settings", ".asked .enlarge"):
        page.click(opener)
        assert page.evaluate("document.querySelector('dialog[open]').scrollWidth <= innerWidth")
        unnamed = page.locator("button, input, textarea, select, [role]").evaluate_all(
            """all => all.filter((one) => !(one.ariaLabel || one.labels?.[0]?.textContent.trim()
                || one.textContent.trim() || one.getAttribute("role") === "status")).map((one) => one.outerHTML)"""
        )
        assert unnamed == [] and page.locator("img:not([alt])").count() == 0
        page.keyboard.press("Escape")
    assert page.locator("[role=log][aria-live=polite]").count() == 1


def test_enter_sends_shift_enter_does_not_and_composing_does_not(script) -> None:
    page, engine = script
    page.focus("#question")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.evaluate(
        "question.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert page.locator(".asked").count() == 0
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE)
    assert engine.requests[0].messages[-1].content == [{"text": "one\ntwo"}]
