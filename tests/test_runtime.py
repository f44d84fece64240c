"""Runtime end to end: the original model's tokens, from an image and a question through all rooms and back."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, GOLDEN_MODELS
from PIL import Image

from qvl_edge import BundleError, CheckpointError, ConfigError, ImageError, PromptError, QvlError, Runtime
from qvl_edge.answer import Answer
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config
from qvl_edge.engine.budget import estimate
from qvl_edge.engine.device import find_device
from qvl_edge.engine.request import Request
from qvl_edge.errors import ContextError
from qvl_edge.load import plan_for
from qvl_edge.options import PROFILES, LoadOptions
from qvl_edge.published import CONFIG, QUANTIZATION
from qvl_edge.vit_cache import exported_vit

TOLERANCE = 1e-4  # nats: golden logits agree to 1e-4, and so do their log-probabilities


@pytest.fixture(scope="module", params=GOLDEN_MODELS)
def golden(request, vit_cache: Path) -> tuple[Path, Runtime]:
    folder = GOLDEN / request.param
    # the original drops transparency
    return folder, Runtime.from_pretrained(folder / "checkpoint", cache_dir=vit_cache, background="none")


@pytest.fixture(scope="module")
def runtime(vit_cache: Path) -> Runtime:
    return Runtime.from_pretrained(GOLDEN / "tiny-a/checkpoint", cache_dir=vit_cache)


@pytest.fixture
def in_golden_images(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(GOLDEN / "tiny-a/images")
    return GOLDEN / "tiny-a/images"


@pytest.mark.parametrize("case", range(4))
def test_answers_equal_the_original_models_token_for_token(golden, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, runtime = golden
    monkeypatch.chdir(folder / "images")
    said = json.loads((folder / "cases.json").read_text())[case]
    expected = np.load(folder / "golden.npz")[f"case{case}/greedy_ids"].tolist()
    history = [tuple(turn) for turn in said["history"]]
    greedy = {"do_sample": False, "max_new_tokens": len(expected)}
    request = Request(said["query"], history, chat_format="chatml", generation=greedy, markup_images=True)
    assert runtime._prompt(request).text == said["raw_text"]
    answer = runtime.engine.complete(runtime.prepare(request)).answer()
    assert answer.token_ids == expected
    assert answer.usage.prompt_tokens == said["n_input"]


def test_every_way_in_gives_the_same_answer(runtime: Runtime, in_golden_images: Path) -> None:
    options = {"do_sample": False, "max_new_tokens": 6}
    path = in_golden_images / "scene0_RGB.png"
    query = Runtime.from_list_format([{"image": str(path)}, {"text": "这是什么?"}])
    response, history = runtime.chat(query, None, **options)
    streamed = list(runtime.chat_stream(query, None, **options))
    asked = runtime.ask(Image.open(path), "这是什么?", **options)
    elements = [{"image": path.read_bytes()}, {"text": "这是什么?"}]
    answered = runtime.answer(elements, **options)
    pieces = list(runtime.answer_stream(elements, **options))
    assert history == [(query, response)]
    assert asked.text == answered.text == response == streamed[-1].strip()
    assert asked.token_ids == answered.token_ids
    assert all(later.startswith(earlier) for earlier, later in zip(streamed, streamed[1:], strict=False))
    assert isinstance(pieces[-1], Answer) and "".join(pieces[:-1]).strip() == response
    assert pieces[-1].token_ids == asked.token_ids


def test_markup_opens_a_file_in_chat_and_is_plain_text_in_answer(runtime: Runtime, in_golden_images: Path) -> None:
    text = "<img>scene0_RGB.png</img> hello"
    one = {"do_sample": False, "max_new_tokens": 1}
    assert runtime.answer(text, **one).usage.images == 0
    assert runtime.ask("scene0_RGB.png", text, **one).usage.images == 1
    with pytest.raises(ImageError, match="no-such-file"):
        runtime.chat("<img>no-such-file.png</img>", None, **one)
    with pytest.raises(PromptError, match="left open"):
        runtime.chat("<img>scene0_RGB.png", None, **one)
    assert runtime.answer("<img>scene0_RGB.png", **one).usage.images == 0
    # what the model once said opens nothing either
    runtime.chat("go on", [("hi", "<img>no-such-file.png</img>")], **one)


def test_an_image_is_encoded_once_whatever_it_is_called(
    runtime: Runtime, in_golden_images: Path, tmp_path: Path
) -> None:
    one = {"do_sample": False, "max_new_tokens": 1}
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    picture.save(tmp_path / "other-name.png")
    first = runtime.ask(picture, "a", **one)
    second = runtime.ask([tmp_path / "other-name.png", picture], "b", **one)
    assert (first.usage.cached_images, second.usage.cached_images, second.usage.images) == (0, 2, 2)
    assert second.usage.image_tokens == 512


def test_an_answer_says_the_frame_of_its_boxes(runtime: Runtime) -> None:
    upright, turned = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (40, 20), "red")
    turned.getexif()[0x112] = 6
    answer = runtime.ask([upright, turned], "a", do_sample=False, max_new_tokens=1)
    assert [image.size for image in answer.images] == [(40, 20), (20, 40)]
    assert answer.to_dict()["images"][1] == {"width": 20, "height": 40, "turned": True}
    request = runtime.prepare(Request([{"image": turned}, {"text": "a"}], generation={"max_new_tokens": 1}))
    request.text = "<box>(0,0),(1000,500)</box>"
    assert request.answer().boxes[0].pixels == (0, 0, 20, 20)


def test_the_background_of_transparent_pictures_is_chosen_at_loading(runtime: Runtime, vit_cache: Path) -> None:
    hidden = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    one = {"do_sample": False, "max_new_tokens": 1}
    runtime.ask(Image.new("RGB", (8, 8), "white"), "a", **one)
    assert runtime.ask(hidden, "a", **one).usage.cached_images == 1
    upstream = Runtime.from_pretrained(GOLDEN / "tiny-a/checkpoint", cache_dir=vit_cache, background="none")
    upstream.ask(Image.new("RGB", (8, 8), (200, 0, 0)), "a", **one)
    assert upstream.ask(hidden, "a", **one).usage.cached_images == 1
    with pytest.raises(ConfigError, match="background is 'nonsense'"):
        Runtime.from_pretrained(GOLDEN / "tiny-a/checkpoint", background="nonsense")


def test_a_seed_repeats_an_answer_and_greedy_needs_none(runtime: Runtime) -> None:
    drawn = [
        runtime.answer("hi", seed=seed, do_sample=True, top_p=1.0, max_new_tokens=12).token_ids for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_stop_strings_end_the_answer_before_them(runtime: Runtime) -> None:
    options = {"do_sample": False, "max_new_tokens": 24}
    whole = runtime.answer("What is Qwen?", **options)
    middle = whole.text[len(whole.text) // 2 :][:3]
    cut = runtime.answer("What is Qwen?", stop=middle, **options)
    assert cut.text == whole.text[: whole.text.index(middle)].strip()
    assert cut.finish_reason == "stop" and whole.finish_reason == "length"
    assert len(cut.token_ids) < len(whole.token_ids)


def test_scores_are_log_probabilities_of_the_golden_logits(golden) -> None:
    folder, runtime = golden
    data = np.load(folder / "golden.npz")
    ids = data["case0/greedy_ids"].tolist()
    text = runtime.tokenizer.decode(ids[:3])
    encoded = runtime.tokenizer.encode(text)
    scores = runtime.score("What is Qwen?", text)
    assert len(scores) == len(encoded)
    logits = torch.from_numpy(data["case0/prefill_logits_last"]).double()
    assert scores[0] == pytest.approx(float(logits.log_softmax(-1)[encoded[0]]), abs=TOLERANCE)
    # and each later one is what a prompt with the earlier ones predicts
    one = runtime.score("What is Qwen?", runtime.tokenizer.decode(encoded[:1]))
    assert one[0] == pytest.approx(scores[0], abs=TOLERANCE)


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(runtime: Runtime) -> None:
    with pytest.raises(PromptError, match=r"the prompt needs \d+ tokens.*holds 8192"):
        runtime.answer("word " * 9000)


@pytest.mark.parametrize("where", ["query", "element", "system", "history"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def encode(*_: object) -> None:
        raise AssertionError("tokenized")

    monkeypatch.setattr(runtime.tokenizer, "encode", encode)
    long = "x" * (runtime.tokenizer.most_characters(runtime.max_context) + 1)
    query = {"query": long, "element": [{"text": long}]}.get(where, "hello")
    history = [("hello", long)] if where == "history" else []
    system = {"system": long} if where == "system" else {}
    with pytest.raises(ContextError, match=f"a text of {len(long)} characters"):
        runtime.answer(query, history, **system)


def test_max_context_limits_prompt_and_answer_together(vit_cache: Path) -> None:
    small = Runtime.from_pretrained(GOLDEN / "tiny-a/checkpoint", cache_dir=vit_cache, max_context=50)
    answer = small.answer("What is Qwen?", do_sample=False, max_new_tokens=100)
    assert answer.usage.prompt_tokens + len(answer.token_ids) == 50 and answer.finish_reason == "length"


def test_an_answer_carries_counts_and_seconds_and_becomes_json(runtime: Runtime) -> None:
    answer = runtime.answer("hi", do_sample=False, max_new_tokens=4)
    content = json.loads(json.dumps(answer.to_dict()))
    assert content["usage"]["completion_tokens"] == len(content["token_ids"]) == 4
    assert content["timing"]["decode_tokens_per_s"] > 0
    assert set(content) == {field.name for field in dataclasses.fields(Answer)} - {"sources"}


def test_raw_format_continues_the_text_as_it_is(runtime: Runtime) -> None:
    generated = runtime.generate("Once", do_sample=False, max_new_tokens=3)
    answered = runtime.answer("Once", chat_format="raw", do_sample=False, max_new_tokens=3)
    assert generated.token_ids == answered.token_ids
    assert generated.usage.prompt_tokens == len(runtime.tokenizer.encode("Once"))


def test_the_latest_picture_of_the_history_is_drawn_on(runtime: Runtime, in_golden_images: Path) -> None:
    history = [
        ("<img>scene1_RGBA.png</img>", "a"),
        ([{"image": "scene0_RGB.png"}, {"text": "q"}], "b"),
        ("no image", "c"),
    ]
    picture = runtime.draw_bbox_on_latest_picture("<ref>圆</ref><box>(100,100),(800,800)</box>", history)
    original = Image.open("scene0_RGB.png").convert("RGB")
    assert picture is not None and picture.size == original.size and picture.tobytes() != original.tobytes()
    assert runtime.draw_bbox_on_latest_picture("no boxes", history) is None
    assert runtime.draw_bbox_on_latest_picture("<box>(1,1),(9,9)</box>", []) is None


def test_what_cannot_be_loaded_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a local folder nor the name of a model"):
        Runtime.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        Runtime.from_pretrained(tmp_path, device="tpu")
    with pytest.raises(ConfigError, match="dtype is 'int3'"):
        Runtime.from_pretrained(tmp_path, dtype="int3")
    (tmp_path / "bundle.json").write_text('{"format_version": 1, "parts": {}}')
    with pytest.raises(BundleError, match="python -m quantize.gptq"):
        Runtime.from_pretrained(tmp_path)


@pytest.mark.slow
def test_the_vision_tower_is_exported_once_and_again_when_the_weights_change(tmp_path: Path, make_checkpoint) -> None:
    checkpoint, cache, said = make_checkpoint("a", seed=1), tmp_path / "cache", []
    for expected in (True, False):
        said.clear()
        Runtime.from_pretrained(checkpoint, cache_dir=cache, progress=said.append)
        assert any("exporting the vision tower" in line for line in said) is expected
    make_checkpoint("a", seed=2)
    Runtime.from_pretrained(checkpoint, cache_dir=cache, progress=said.append)
    assert said and len(list(cache.glob("vit-*"))) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        *(({"profile": profile}, "int8") for profile in ("auto", *PROFILES)),
        *(({"profile": profile, "dtype": "float32"}, "float") for profile in PROFILES),
        ({"dtype": "bfloat16"}, "int8"),
        ({"profile": "8g", "activations": "float"}, "float"),
        ({"dtype": "float32", "activations": "int8"}, "int8"),
    ],
)
def test_a_cpu_s_activations_are_int8_unless_float_or_float32_is_asked_for(
    options: dict[str, Any], expected: str
) -> None:
    cpu, said = torch.device("cpu"), list[str]()
    asked = LoadOptions(max_memory="64GB", **options)
    plan = plan_for(Config.from_dict(CONFIG, QUANTIZATION), asked, cpu, cpu, None, said.append)
    assert plan.activations == expected
    assert f"{expected} activations" in said[0]


@pytest.mark.parametrize(("options", "expected"), [({}, "float"), ({"head": "int8"}, "int8")])
def test_a_float_model_has_int8_activations_at_an_int8_head_alone(options: dict[str, Any], expected: str) -> None:
    cpu, asked = torch.device("cpu"), LoadOptions(max_memory="64GB", profile="12g", **options)
    assert plan_for(Config.from_dict(CONFIG), asked, cpu, cpu, None, print).activations == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, "head float32, cache float32"), ({"dtype": "bfloat16", "kv_cache": "int8"}, "head bfloat16, cache int8")],
)
def test_loading_says_the_precision_that_is_computed_in(runtime: Runtime, options: dict[str, str], words: str) -> None:
    said, cpu = list[str](), torch.device("cpu")
    plan_for(runtime.config, LoadOptions(**options), cpu, cpu, None, said.append)  # type: ignore[arg-type]
    assert words in said[0]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, make_checkpoint) -> None:
    folder = make_checkpoint("b")
    (folder / "qwen.tiktoken").write_bytes((GOLDEN / "tiny-a/checkpoint/qwen.tiktoken").read_bytes())
    with pytest.raises(ConfigError, match="image_start_id 470"):
        Runtime.from_pretrained(folder, cache_dir=tmp_path / "cache")


@pytest.mark.slow
def test_processes_that_need_one_vision_tower_export_it_once(tmp_path: Path, make_checkpoint) -> None:
    checkpoint, said = Checkpoint(make_checkpoint("one", seed=3)), []
    with ThreadPoolExecutor(2) as pool:  # a lock belongs to an open file, so threads meet it as processes do
        options = {"dtype": "float32", "cache_dir": tmp_path / "cache", "progress": said.append}
        paths = list(pool.map(lambda _: exported_vit(checkpoint, **options), range(2)))
    assert paths[0] == paths[1] and paths[0].is_file()
    assert sum("exporting the vision tower" in line for line in said) == 1
    data = paths[0].with_name("vit.onnx.data")
    intact = data.read_bytes()
    for damaged, manifest in ((bytes(len(intact)), None), (intact[: len(intact) // 2], "{")):
        data.write_bytes(damaged)
        if manifest:
            data.with_name("bundle.json").write_text(manifest, encoding="utf-8")
        exported_vit(checkpoint, **options)
        assert data.read_bytes() == intact


def test_the_second_turn_about_a_picture_prefills_only_what_is_new(vit_cache: Path) -> None:
    runtime, fresh = (Runtime.from_pretrained(GOLDEN / "tiny-a/checkpoint", cache_dir=vit_cache) for _ in range(2))
    greedy = {"do_sample": False, "max_new_tokens": 8}
    query = [{"image": GOLDEN / "tiny-a/images/scene0_RGB.png"}, {"text": "What is it?"}]
    first = runtime.answer(query, **greedy)
    assert (first.usage.cached_tokens, first.usage.cached_images) == (0, 0)
    history = [(query, first.text)]
    second = runtime.answer("And then?", history, **greedy)
    assert second.usage.cached_tokens > 256 and second.usage.cached_images == 1
    assert second.timing.prefilled_tokens == second.usage.prompt_tokens - second.usage.cached_tokens
    assert second.token_ids == fresh.answer("And then?", history, **greedy).token_ids
    runtime.forget()
    third = runtime.answer("And then?", history, **greedy)
    assert (third.usage.cached_tokens, third.usage.cached_images) == (0, 0)
    assert third.token_ids == second.token_ids


def test_streams_that_take_turns_do_not_disturb_each_other(runtime: Runtime) -> None:
    questions = ("One?", "Two, please?")
    greedy = {"do_sample": False, "max_new_tokens": 6}
    alone = [runtime.answer(question, **greedy).text for question in questions]
    streams = [runtime.answer_stream(question, **greedy) for question in questions]
    last = ["", ""]
    for pieces in itertools.zip_longest(*streams):
        for index, piece in enumerate(pieces):
            if isinstance(piece, Answer):
                last[index] = piece.text
    assert last == alone


def test_generation_goes_on_past_the_end_where_it_is_told_to(runtime: Runtime) -> None:
    answer = runtime.answer("Stop at once?", do_sample=False, max_new_tokens=40, ignore_eos=True)
    assert (len(answer.token_ids), answer.finish_reason) == (40, "length")


@pytest.mark.parametrize(("device", "vision_device"), [("auto", "cuda:0"), ("cuda", None), ("cuda:0", "cuda")])
def test_a_vision_device_that_is_the_models_own_counts_in_its_budget(
    device: str, vision_device: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name="a card", major=8, minor=6, uuid="GPU-1")
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": card,
        "mem_get_info": (12 << 30, 12 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    place = find_device(device)
    encoding = place if vision_device is None else find_device(vision_device, option="vision_device", kernels=False)
    plan = plan_for(Config.from_dict(CONFIG, QUANTIZATION), LoadOptions(), place, encoding, None, lambda _: None)
    assert plan.vision == "resident"
    assert estimate(Config.from_dict(CONFIG, QUANTIZATION), plan).vision > 3 * 10**9


WRONG: list[tuple[Callable[[Runtime], object], str]] = [
    (lambda runtime: runtime.answer(5), "the query is a int"),  # type: ignore[arg-type]
    (lambda runtime: runtime.answer("q", 5), "history is a int"),  # type: ignore[arg-type]
    (lambda runtime: runtime.answer("q", [5]), r"history\[0\] is 5"),  # type: ignore[list-item]
    (lambda runtime: runtime.answer("q", [(1, 2)]), r"history\[0\] is \(1, 2\)"),  # type: ignore[list-item]
    (lambda runtime: runtime.answer("q", system=5), "system is a int"),  # type: ignore[arg-type]
    (lambda runtime: runtime.score("q", None), "continuation is a NoneType"),  # type: ignore[arg-type]
    (lambda runtime: next(runtime.map("scene.png", "q")), "images is a str, expected a list"),
    (lambda runtime: next(runtime.map(5, "q")), "images is a int"),  # type: ignore[arg-type]
    (lambda runtime: next(runtime.map([b""], "q", output=5)), "output is a int"),  # type: ignore[arg-type]
    (lambda runtime: runtime.from_list_format(5), "the elements are a int"),  # type: ignore[arg-type]
    (lambda runtime: runtime.to_list_format(5), "the text is a int"),  # type: ignore[arg-type]
    (lambda runtime: runtime.draw_bbox_on_latest_picture("q", 5), "history is a int"),  # type: ignore[arg-type]
    (lambda runtime: runtime.draw_bbox_on_latest_picture(5), "response is a int"),  # type: ignore[arg-type]
    (lambda runtime: Runtime.from_pretrained(None), "the model is a NoneType"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_value_of_another_type_is_refused_by_name(
    runtime: Runtime, call: Callable[[Runtime], object], message: str
) -> None:
    with pytest.raises(QvlError, match=message):
        call(runtime)
