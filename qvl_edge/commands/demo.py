"""The main job on the small model that ships: quantize to int4, export the vision tower, answer about pictures."""

import argparse
import html
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_edge import child
from qvl_edge.commands.loading import say

if TYPE_CHECKING:
    from qvl_edge.checkpoint import Checkpoint
    from qvl_edge.demo.scenes import Question, Scene
    from qvl_edge.runtime import Runtime

CALIBRATION_SCENES = 48
FIRST_SCENE = 2_000_000_012  # past UNSEEN: no scene from here on is used for training or calibration

EXAMPLES = """examples:
  qvl-edge demo
  qvl-edge demo --scenes 8 --output try"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge demo`."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="FOLDER",
        help="its bundle is replaced (demo-output)",
    )
    parser.add_argument("--scenes", type=int, default=4, metavar="N", help="pictures to ask about (default: 4)")


def execute(args: argparse.Namespace) -> int:
    """Checkpoint → int4 bundle → ONNX vision tower → answers, step by step."""
    from qvl_edge.demo import SMALL_MODEL as checkpoint
    from qvl_edge.demo.scenes import UNSEEN, write_conversations
    from qvl_edge.errors import QvlError

    began = time.perf_counter()
    if not (checkpoint / "config.json").exists():
        raise QvlError(f"{checkpoint} is missing; the package was installed without its data, install it again")
    output: Path = args.output
    bundle = output / "bundle"
    _check_is_ours(bundle, checkpoint)

    _heading("1. The checkpoint: a small Qwen-VL-Chat in the published layout")
    _describe(checkpoint)
    _heading("2. Calibration conversations, in Qwen-VL's fine-tuning format")
    conversations = write_conversations(output / "calibration", UNSEEN, CALIBRATION_SCENES)
    print(f"{CALIBRATION_SCENES} scenes with questions and answers: {conversations}")
    _heading("3. GPTQ: the decoder's projections to int4")
    _command("quantize.gptq", str(checkpoint), str(bundle), "--calibration", str(conversations), "--overwrite")
    _heading("4. The vision tower as ONNX")
    _command("export.vit", str(checkpoint), str(bundle))
    _heading("5. Memory, part by part")
    memory = _memory_table(checkpoint, bundle)
    print(memory)
    _heading("6. Answers about pictures it has never seen")
    sheet = output / "index.html"
    sheet.write_text(_page(memory, _answers(bundle, output, args.scenes)), encoding="utf-8")
    print(f"All of it on one page: {sheet.absolute().as_uri()}")
    _heading(f"Done in {time.perf_counter() - began:.0f} s. With a real checkpoint:")
    print(
        "  python -m quantize.gptq Qwen-VL-Chat BUNDLE --calibration conversations.json\n"
        "  python -m export.vit    Qwen-VL-Chat BUNDLE\n"
        '  qvl-edge run BUNDLE --image street.jpg "框出红色的车" --draw out.png\n'
        "Qwen-VL-Chat-Int4 runs as it is: qvl-edge run Qwen-VL-Chat-Int4 --image street.jpg …"
    )
    return 0


def _heading(text: str) -> None:
    print(f"\n{text}", flush=True)


def _check_is_ours(bundle: Path, checkpoint: Path) -> None:
    """QvlError if `bundle` is another model's: the demo replaces only its own."""
    from qvl_edge.bundle import read_manifest
    from qvl_edge.checkpoint import Checkpoint
    from qvl_edge.errors import QvlError

    made_from = {entry["fingerprint"] for entry in read_manifest(bundle).values()}
    if made_from - {Checkpoint(checkpoint).fingerprint}:
        raise QvlError(f"{bundle} is a bundle of another model; give another folder with --output")


def _command(module: str, *arguments: str) -> None:
    """Run `python -m module` as a user would."""
    from qvl_edge.errors import QvlError

    print(f"$ python -m {module} {' '.join(arguments)}", flush=True)
    if code := child.start(module, *arguments).wait():
        raise QvlError(f"python -m {module} failed with exit code {code}; see its last lines above")


def _parts(checkpoint: "Checkpoint") -> dict[str, int]:
    """Bytes of each part of a checkpoint's or bundle's tensors."""
    from qvl_edge.checkpoint import VISUAL

    prefixes = {"embeddings": "transformer.wte", "lm_head": "lm_head", "vision tower": VISUAL}
    sizes = dict.fromkeys(("decoder layers", *prefixes), 0)
    for name in checkpoint.names:
        part = next((part for part, prefix in prefixes.items() if name.startswith(prefix)), "decoder layers")
        sizes[part] += checkpoint.nbytes(name)
    return sizes


def _describe(path: Path) -> None:
    from qvl_edge.checkpoint import Checkpoint

    checkpoint = Checkpoint(path)
    config = checkpoint.config
    parameters = sum(checkpoint[name].numel() for name in checkpoint.names)
    print(
        f"{path}\n{parameters / 1e6:.1f} M parameters in {config.torch_dtype} | decoder {config.num_hidden_layers} "
        f"layers x {config.hidden_size} | vision {config.visual.layers} layers x {config.visual.width}, patches of "
        f"{config.visual.patch_size} | vocabulary {config.vocab_size}"
    )


def _memory_table(source: Path, bundle: Path) -> str:
    from qvl_edge.bundle import VIT, VIT_DATA
    from qvl_edge.checkpoint import Checkpoint

    before, after = _parts(Checkpoint(source)), _parts(Checkpoint(bundle))
    after["vision tower"] = sum((bundle / name).stat().st_size for name in (VIT, VIT_DATA))
    rows = [(part, before[part], after[part]) for part in before]
    rows.append(("total", sum(before.values()), sum(after.values())))
    lines = [f"{part:16}{old / 1e6:9.2f} MB{new / 1e6:9.2f} MB" for part, old, new in rows]
    return "\n".join([f"{'':16}{'float16':>12}{'bundle':>12}", *lines])


SHEET = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>qvl-edge demo</title><style>
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;padding:0 1rem;max-width:60rem}
section{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1rem 1.5rem;margin:1.5rem 0}
img{width:100%;border-radius:8px}dl{margin:0}dt{font-weight:600}dd{margin:0 0 .7rem}small{color:#c43}
pre{overflow:auto;font-size:.8rem}
</style>"""


def _page(memory: str, scenes: list[tuple[str, list[tuple[str, str, str]]]]) -> str:
    """The sheet: each picture with its questions and answers, and the memory table. It needs no other file but them."""
    figures = []
    for picture, asked in scenes:
        rows = "".join(
            f"<dt>{html.escape(question)}</dt><dd>{html.escape(said)}"
            f"{f' <small>exact answer: {html.escape(wanted)}</small>' if wanted else ''}</dd>"
            for question, said, wanted in asked
        )
        figures.append(f'<section><img src="{picture}" alt="{picture}"><dl>{rows}</dl></section>')
    note = "Answers of the small model, quantized to int4, about pictures that it has never seen."
    return f"{SHEET}<h1>qvl-edge demo</h1><p>{note}</p>{''.join(figures)}<pre>{html.escape(memory)}</pre></html>\n"


def _questions(scene: "Scene", index: int) -> list["Question"]:
    """Up to four questions, every second one in Chinese; kinds and languages change from scene to scene."""
    import numpy as np

    from qvl_edge.demo.scenes import ask

    rng = np.random.default_rng(index)
    kinds = (("describe", "find", "count", "read"), ("find", "read", "at", "count"))[index % 2]
    asked = (ask(scene, kind, ("en", "zh")[(index + i) % 2], rng) for i, kind in enumerate(kinds))
    return [question for question in asked if question is not None]


def _answers(bundle: Path, output: Path, count: int) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Ask, print and draw; of each scene the picture's file, the questions, answers and, if other, exact ones."""
    from qvl_edge.demo.scenes import make_scene
    from qvl_edge.runtime import Runtime
    from qvl_edge.text.boxes import Box, plain_text
    from qvl_edge.text.draw import draw_boxes

    runtime = Runtime.from_pretrained(bundle)
    exact: list[bool] = []
    scenes: list[tuple[str, list[tuple[str, str, str]]]] = []
    for index in range(count):
        scene = make_scene(FIRST_SCENE + index)
        picture, boxes, asked = output / f"scene-{index + 1}.png", list[Box](), list[tuple[str, str, str]]()
        print(f"\nscene {index + 1}")
        for question in _questions(scene, index):
            answer = runtime.ask(scene.image, question.text, do_sample=False)
            exact.append(answer.text == question.answer)
            boxes += answer.boxes
            asked.append((question.text, answer.plain_text, "" if exact[-1] else plain_text(question.answer)))
            note = "" if exact[-1] else f"   (exact answer: {question.answer})"
            print(f"  {question.text}\n    {answer.text}{note}")
            timing, cached = answer.timing, " (cached)" if answer.usage.cached_images else ""
            say(
                f"    {timing.decode_tokens_per_s:.0f} tokens/s, prompt {timing.prefill_s * 1000:.0f} ms, "
                f"image {timing.image_s * 1000:.0f} ms{cached}"
            )
        draw_boxes(scene.image, list(dict.fromkeys(boxes))).save(picture)
        scenes.append((picture.name, asked))
        print(f"  picture with boxes: {picture}")
    exact += _two_pictures(runtime)
    print(f"\n{sum(exact)} of {len(exact)} answers are exact to the letter.")
    return scenes


def _two_pictures(runtime: "Runtime") -> list[bool]:
    """Ask which of two pictures shows something; whether each answer is exact."""
    import numpy as np

    from qvl_edge.demo.scenes import ask_which, make_scene

    scenes = make_scene(FIRST_SCENE + 100), make_scene(FIRST_SCENE + 101)
    exact = []
    print("\ntwo pictures")
    for language in ("en", "zh"):
        question = ask_which(scenes, language, np.random.default_rng(1))
        if question is None:
            continue
        images: list[Any] = [scene.image for scene in scenes]
        answer = runtime.ask(images, question.text, do_sample=False)
        exact.append(answer.text == question.answer)
        print(f"  {question.text}\n    {answer.text}")
    return exact
