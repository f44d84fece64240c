"""The pictures of the README, from the small model that ships: python -m benchmarks.pictures [--page]

docs/images/answer.png is an answer with its boxes; a test makes it again and compares. With --page, page.png is the
server's page with the same question, in Chromium (apt-get install chromium; playwright is among the test tools); a
test compares the hash of what it was made from, which it carries. --variants FOLDER: dark, Chinese, phone, to look at.
"""

import argparse
import hashlib
import io
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from qvl_edge import Runtime
from qvl_edge.demo import SMALL_MODEL
from qvl_edge.demo.scenes import make_scene
from qvl_edge.server import page

IMAGES = Path(__file__).parent.parent / "docs/images"
SCENE = 2_000_000_024  # which the model has not seen; it finds all four shapes
QUESTION = "Describe the picture with boxes."


def main(arguments: list[str] | None = None) -> int:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="the screenshot too")
    parser.add_argument("--variants", type=Path, metavar="FOLDER", help="more screenshots, to look at")
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="FOLDER", help="default: docs/images")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    with Runtime.from_pretrained(SMALL_MODEL, device="cpu") as runtime:
        draw(runtime).save(args.out / "answer.png")
    if args.page:
        shoot(args.out / "page.png", args.variants)
    return 0


def page_source() -> str:
    """A hash of all that the screenshot shows: the page's files, the question and the answer's picture."""
    parts = [path.encode() + file.read_bytes() for path, file in sorted(page.FILES.items())]
    answer = Image.open(IMAGES / "answer.png").tobytes()
    return hashlib.sha256(b"".join([*parts, QUESTION.encode(), answer])).hexdigest()


def draw(runtime: Runtime) -> Image.Image:
    """The scene with the boxes of the model's answer."""
    return runtime.ask(make_scene(SCENE).image, QUESTION, do_sample=False).draw()


def shoot(picture: Path, variants: Path | None) -> None:
    """The screenshot of the page, and of its variants into their folder."""
    from playwright.sync_api import sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "qvl_edge", "serve", str(SMALL_MODEL), "--port", str(port), "--device", "cpu"]
    with (
        subprocess.Popen([*command, "--greedy", "--served-model-name", "small"]) as server,
        sync_playwright() as driver,
        tempfile.TemporaryDirectory() as folder,
    ):
        scene = Path(folder) / "scene.png"
        make_scene(SCENE).image.save(scene)
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"{url}/health")
                    break
                except OSError:
                    time.sleep(0.5)
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for name, width, scheme, locale, words in (
                ("page", 1240, "light", "en-US", QUESTION),
                ("page-dark", 1240, "dark", "en-US", QUESTION),
                ("page-zh", 1240, "light", "zh-CN", "描述这张图并框出图形。"),
                ("page-phone", 390, "light", "en-US", QUESTION),
            )[: None if variants else 1]:
                looks: dict[str, Any] = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
                tab = browser.new_context(**looks, locale=locale).new_page()
                tab.goto(url)
                tab.set_input_files("#files", scene)
                tab.wait_for_selector("#pictures li")
                tab.fill("#question", words)
                tab.click("#send")
                tab.wait_for_selector(".answer[aria-busy=false] polygon")
                tab.wait_for_function("document.querySelector('#memory').textContent")
                shot = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
                if variants:
                    variants.mkdir(parents=True, exist_ok=True)
                    shot.save(variants / f"{name}.png")
                if name == "page":
                    note = PngInfo()
                    note.add_text("Source", page_source())
                    shot.quantize(256, dither=Image.Dither.NONE).save(picture, pnginfo=note, optimize=True)
        finally:
            server.terminate()


if __name__ == "__main__":
    raise SystemExit(main())
