"""The page in a real browser (headless Chromium): what a user does, and what it must never do."""

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl_edge.demo.scenes import Scene
from qvl_edge.runtime import Runtime
from qvl_edge.text.prompt import Message

from .harness import ScriptedWorker, Server, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium here (apt-get install chromium)", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")

pytestmark = pytest.mark.slow

FIRST_COLOUR = (230, 25, 75)  # the first of the palette
DONE = ".answer[aria-busy=false]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh page; whatever it complains about fails the test."""
    context = browser.new_context(locale="en-US", viewport={"width": 1000, "height": 900})
    opened = context.new_page()
    complaints: list[str] = []
    opened.set_default_timeout(15_000)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", lambda dialog: complaints.append(dialog.message))
    opened.on("console", lambda said: complaints.append(said.text) if "401" not in said.text else None)
    yield opened
    context.close()
    assert not complaints


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


def ask(page: Any, words: str, *images: Path) -> None:
    if images:
        page.set_input_files("#files", images)
        page.wait_for_selector(f"#pictures li:nth-child({len(images)})")
    page.fill("#question", words)
    page.click("#send")


def check_frames(page: Any, boxes: list[dict[str, Any]], size: tuple[int, int]) -> list[list[float]]:
    """Each polygon of the last answer lies where its box is, to half a CSS pixel; their x, y, width, height."""
    stage = page.locator(".answer").last.locator(".stage")
    stage.scroll_into_view_if_needed()
    picture = stage.locator("img").bounding_box()
    assert picture["width"] / picture["height"] == pytest.approx(size[0] / size[1], rel=0.01)
    found = stage.locator("polygon").evaluate_all("all => all.map(one => one.getBoundingClientRect().toJSON())")
    scale = picture["width"] / size[0]
    expected = sorted(
        [picture["x"] + x1 * scale, picture["y"] + y1 * scale, (x2 - x1) * scale, (y2 - y1) * scale]
        for x1, y1, x2, y2 in (box["pixels"] for box in boxes)
    )
    for frame, at in zip(
        sorted([one[k] for k in ("x", "y", "width", "height")] for one in found), expected, strict=True
    ):
        assert frame == pytest.approx(at, abs=0.5)
    return expected


def test_two_pictures_a_question_and_frames_where_the_boxes_are(
    page, server: Server, runtime: Runtime, files, tmp_path: Path
) -> None:
    visit(page, server)
    ask(page, "Find the black circle.", files[0], files[2])
    page.wait_for_selector(DONE)
    answer = runtime.ask([files[0], files[2]], "Find the black circle.")
    boxes = [box.to_dict() for box in answer.boxes]
    assert boxes and {box["image"] for box in boxes} == {1}
    (x, y, _, height), *_ = check_frames(page, boxes, (640, 400))
    assert page.locator(".asked img").count() == 2
    assert page.locator(".stage img").get_attribute("alt") == "scene2.png"
    label = page.locator(".stage .name").first.text_content()
    assert label == boxes[0]["label"] and label in page.locator(".said").text_content()
    assert "<box>" not in page.locator(".said").text_content()
    # the frame is there in the picture's pixels too
    shot = tmp_path / "shot.png"
    page.screenshot(path=shot)
    at = (int(x), int(y + height / 2))  # wholly within a line of 3 pixels around x
    assert Image.open(shot).convert("RGB").getpixel(at) == FIRST_COLOUR


def test_pointing_at_a_phrase_lights_its_frame_and_the_other_way_round(page, server: Server, files) -> None:
    visit(page, server)
    ask(page, "Describe the picture with boxes.", files[0])
    page.wait_for_selector(DONE)
    phrases = page.locator(".phrase")
    assert phrases.count() == 2
    colours = phrases.evaluate_all("all => all.map(one => one.style.getPropertyValue('--colour'))")
    assert len(set(colours)) == 2
    for hover, name in ((phrases.nth(1), phrases.nth(1).text_content()),):
        hover.hover()
        assert page.locator("polygon.lit").get_attribute("data-name") == name
        assert page.locator("polygon:not(.lit)").count() == 1
    page.locator("polygon").first.hover()
    assert page.locator(".phrase.lit").text_content() == page.locator("polygon.lit").get_attribute("data-name")
    phrases.first.focus()  # by keyboard, as by mouse
    assert page.locator("polygon.lit").get_attribute("data-name") == phrases.first.text_content()


def test_a_follow_up_in_chinese_sees_the_earlier_turn(page, server: Server, runtime: Runtime, files) -> None:
    visit(page, server)
    page.click("#language")
    assert page.locator("html").get_attribute("lang") == "zh-CN" and page.locator("#send").text_content() == "发送"
    ask(page, "有几个图形？", files[0])
    page.wait_for_selector(DONE)
    ask(page, "框出红色菱形。")
    page.wait_for_selector(f"{DONE} >> nth=1")
    first = [{"image": files[0].read_bytes()}, {"text": "有几个图形？"}]
    counted = runtime.answer(first)
    found = runtime.answer([{"text": "框出红色菱形。"}], [(first, counted.text)])
    assert page.locator(".said").first.text_content() == counted.text
    assert page.locator(".answer").last.locator(".phrase").all_text_contents() == [box.label for box in found.boxes]
    check_frames(page, [box.to_dict() for box in found.boxes], (640, 400))


class Gate:
    """Holds back the pieces of a ScriptedWorker after the first until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def __call__(self, index: int) -> Any:
        async def wait() -> None:
            while not self.opened.is_set():
                await asyncio.sleep(0.005)

        return wait() if index else None


def test_the_answer_grows_stops_and_is_made_again(page) -> None:
    gate = Gate()
    engine = ScriptedWorker("One ", "<ref>th", "ing</ref><box>(0,0),(9,9)</box> more", before=gate)
    with serving(engine) as server:
        visit(page, server)
        ask(page, "go")
        shows(page, ".said", "One ")
        assert page.locator("#send").is_hidden() and page.locator(".answer").get_attribute("aria-busy") == "true"
        page.click("#stop")
        page.wait_for_selector(DONE)
        assert engine.cancelled.wait(10)
        assert "stopped" in page.locator(".tools").text_content() and page.locator("#send").is_visible()
        gate.opened.set()
        page.click(".again")
        shows(page, ".said", "One thing more")
        page.wait_for_selector(DONE)
        assert page.locator(".answer").count() == 1 and "3 tokens" in page.locator(".tools").text_content()
        assert [len(request.messages) for request in engine.requests] == [1, 1]
        page.click("#clear")
        assert page.locator(".answer").count() == 0 and page.locator("#welcome").is_visible()


def test_what_the_model_and_the_user_write_is_never_html(page) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script><b>b</b><ref><i>l</i></ref> <svg onload=alert(3)>"
    with serving(ScriptedWorker(evil)) as server:
        visit(page, server)
        ask(page, evil)
        page.wait_for_selector(DONE)
        assert page.locator(".asked p").text_content() == evil
        assert page.locator(".said").text_content() == evil.replace("<ref>", "").replace("</ref>", "")
        assert page.locator("#log :is(script, b, i, svg, img)").count() == 0


def test_errors_are_shown_and_the_next_question_works(page) -> None:
    with serving(ScriptedWorker("fine")) as server:
        visit(page, server)
        page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=ERROR_STREAM))
        ask(page, "one")
        shows(page, ".answer .problem", "no memory")
        page.unroute("**/v1/chat/completions")
        ask(page, "two")
        shows(page, ".said >> nth=1", "fine")


ERROR_STREAM = 'data: {"error": {"message": "no memory"}}\n\ndata: [DONE]\n\n'


def test_a_server_with_a_key_asks_for_it_and_keeps_it_for_the_tab_only(page) -> None:
    with serving(ScriptedWorker("hello"), key="sesame") as server:
        page.goto(server.url)
        page.wait_for_selector("#panel[open]")
        assert page.locator("#key-note").is_visible()
        page.fill("#key", "sesame")
        page.keyboard.press("Enter")
        shows(page, "#model", "small")
        ask(page, "hi")
        page.wait_for_selector(DONE)
        page.reload()
        shows(page, "#model", "small")
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
        shows(page, ".said", "hello")  # the conversation stays, the key of another tab does not


def test_settings_language_and_theme_survive_a_reload(page) -> None:
    engine = ScriptedWorker("x")
    with serving(engine) as server:
        visit(page, server)
        page.click("#settings")
        for name, value in (("temperature", "0"), ("seed", "7"), ("max_tokens", "9"), ("system", "Be brief.")):
            page.fill(f"[name={name}]", value)
        page.click("#panel .main")
        page.click("#language")
        page.click("#theme")
        assert page.locator("html").get_attribute("data-theme") == "dark"
        page.reload()
        visit(page, server)
        assert page.locator("html").get_attribute("data-theme") == "dark"
        assert page.locator("html").get_attribute("lang") == "zh-CN"
        ask(page, "问")
        page.wait_for_selector(DONE)
    assert engine.requests[0].generation == {"temperature": 0.0, "seed": 7, "max_new_tokens": 9}
    assert engine.requests[0].messages[0] == Message("system", "Be brief.")


def test_pictures_are_pasted_dropped_and_taken_away(page, files) -> None:
    with serving(ScriptedWorker("x")) as server:
        visit(page, server)
        for kind, holder in (("paste", "clipboardData"), ("drop", "dataTransfer")):
            page.evaluate(
                """async ([kind, holder, bytes]) => {
                    const transfer = new DataTransfer();
                    transfer.items.add(new File([new Uint8Array(bytes)], `${kind}.png`, { type: "image/png" }));
                    const make = kind === "paste" ? ClipboardEvent : DragEvent;
                    dispatchEvent(new make(kind, { [holder]: transfer, cancelable: true }));
                }""",
                [kind, holder, list(files[0].read_bytes())],
            )
            page.wait_for_selector(f"#pictures img[alt='{kind}.png']")
        page.click("#pictures li:first-child button")
        assert page.locator("#pictures img").evaluate_all("all => all.map(one => one.alt)") == ["drop.png"]
        page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
        shows(page, "#status", "a.png is not a picture that can be shown in this browser; save it as JPEG or PNG.")


def test_what_is_shown_is_what_the_model_gets(page, tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x112] = 6
    photo, drawing, big = tmp_path / "photo.jpg", tmp_path / "drawing.svg", tmp_path / "big.png"
    Image.new("RGB", (80, 40), "red").save(photo, exif=tags)
    drawing.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="30" height="20"><rect width="9" height="9"/></svg>'
    )
    Image.new("RGBA", (5000, 4000), (9, 9, 9, 0)).save(big)
    engine = ScriptedWorker("<box>(0,0),(1000,500)</box>")
    with serving(engine) as server:
        visit(page, server)
        ask(page, "a", photo, drawing, big)
        page.wait_for_selector(DONE)
        sizes = page.locator(".asked img").evaluate_all("all => all.map(one => [one.naturalWidth, one.naturalHeight])")
    pictures = pictures_of(engine.requests[0].messages[-1])
    assert [picture.frame for picture in pictures] == [(*size, False) for size in sizes]
    assert sizes[:2] == [[40, 80], [30, 20]] and sizes[2][0] / sizes[2][1] == pytest.approx(5 / 4, abs=1e-3)
    assert sizes[2][0] * sizes[2][1] <= 16_000_000 and pictures[2].square.getpixel((9, 9)) == (255, 255, 255)
    assert pictures[1].square.getpixel((9, 9)) == (0, 0, 0)  # the black corner of the drawing
    assert pictures[1].square.getpixel((400, 400)) == (255, 255, 255)


def test_the_conversation_and_the_picture_with_its_frames_are_saved(page, server: Server, files, tmp_path) -> None:
    visit(page, server)
    ask(page, "Find the red diamond.", files[0])
    page.wait_for_selector(DONE)
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


def test_a_phone_photo_is_sent_small_and_the_seventeenth_picture_drops_the_oldest_turn(page, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    Image.effect_noise((4032, 3024), 90).convert("RGB").save(photo)
    other = tmp_path / "other.png"
    Image.new("RGB", (40, 30)).save(other)
    engine, bodies = ScriptedWorker("fine"), list[int]()
    with serving(engine) as server:
        visit(page, server)
        page.on("request", lambda sent: bodies.append(len(sent.post_data or "")))
        ask(page, "a", photo, *[other] * 8)
        page.wait_for_selector(DONE)
        ask(page, "b", *[other] * 9)
        page.wait_for_selector(f"{DONE} >> nth=1")
        assert page.locator(".answer .problem").count() == 0
    assert [len(pictures_of(request.messages[-1])) for request in engine.requests] == [9, 9]
    assert [len(request.messages) for request in engine.requests] == [1, 1]
    assert max(bodies) < 3_000_000  # of noise, the worst case: the file as it is has 8 MB
    assert pictures_of(engine.requests[0].messages[0])[0].frame.size == (1600, 1200)


def test_a_broken_off_answer_is_marked_and_is_no_history(page) -> None:
    gate = Gate()
    engine = ScriptedWorker("half ", "whole", before=gate)
    with serving(engine) as server:
        visit(page, server)
        ask(page, "one")
        shows(page, ".said", "half ")
        page.click("#stop")
        page.wait_for_selector(DONE)
        assert "broken off" in page.locator(".tools").text_content()
        gate.opened.set()
        ask(page, "two")
        shows(page, ".said >> nth=1", "half whole")
        page.wait_for_selector(f"{DONE} >> nth=1")
    assert len(engine.requests[1].messages) == 1


def test_boxes_move_to_the_picture_they_belong_to_and_a_reload_keeps_all(page, files) -> None:
    with serving(ScriptedWorker("<ref>it</ref><box>(100,100),(500,500)</box>")) as server:
        visit(page, server)
        ask(page, "q", *files[:2])
        page.wait_for_selector(DONE)
        assert "Picture 2: scene1.png" in page.locator("figcaption").text_content()
        page.click(".move")
        assert "Picture 1: scene0.png" in page.locator("figcaption").text_content()
        check_frames(page, [{"pixels": (64, 40, 320, 200)}], (640, 400))
        page.reload()
        shows(page, ".phrase", "it")
        check_frames(page, [{"pixels": (64, 40, 320, 200)}], (640, 400))
        page.click(".edit")
        assert page.locator(".answer").count() == 0 and page.input_value("#question") == "q"
        assert page.locator("#pictures img").count() == 2


def test_a_dropped_file_of_another_kind_is_named(page) -> None:
    with serving(ScriptedWorker("x")) as server:
        visit(page, server)
        page.evaluate(
            """() => {
                const dataTransfer = new DataTransfer();
                dataTransfer.items.add(new File(["x"], "paper.pdf", { type: "application/pdf" }));
                dispatchEvent(new DragEvent("drop", { dataTransfer, cancelable: true }));
            }"""
        )
        shows(page, "#status", "paper.pdf is not a picture that can be shown in this browser; save it as JPEG or PNG.")


@pytest.mark.parametrize("width", [320, 390, 1000])
def test_it_fits_the_width_and_everything_has_a_name(page, server: Server, files, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    visit(page, server)
    ask(page, "Find the red diamond. " + "W" * 200, files[0])
    page.wait_for_selector(DONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('main').scrollWidth") <= width
    unnamed = page.locator("button, input, textarea, select, [role]").evaluate_all(
        """all => all.filter((one) => !(one.ariaLabel || one.labels?.[0]?.textContent.trim() || one.textContent.trim()
            || one.getAttribute("role") === "status")).map((one) => one.outerHTML)"""
    )
    assert unnamed == [] and page.locator("img:not([alt])").count() == 0
    assert page.locator("[role=log][aria-live=polite]").count() == 1


def test_enter_sends_shift_enter_does_not_and_composing_does_not(page) -> None:
    engine = ScriptedWorker("x")
    with serving(engine) as server:
        visit(page, server)
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
