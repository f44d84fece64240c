"""The snippets of Qwen-VL's TUTORIAL.md and TUTORIAL_zh.md, by their number in docs/parity.md.

Upstream's go on from one another; here each starts from what the earlier ones leave, so that it fails alone. Imports
come from qvl_edge.compat, pictures and questions are ours; calls and names of arguments are upstream's. The two files
have the same code and mix both languages, and so do these tests.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from snippets import SMALL

from qvl_edge import Runtime
from qvl_edge.compat import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, QWenLMHeadModel, QWenTokenizer
from qvl_edge.demo.scenes import Scene, box_markup
from qvl_edge.text.boxes import parse_boxes

from .conftest import assert_framed, pixels_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("at_home")]
DESCRIBE = "描述这张图并框出图形。"
History = list[tuple[str, str]]


@pytest.fixture(scope="module")
def tokenizer() -> QWenTokenizer:
    return AutoTokenizer.from_pretrained(SMALL, trust_remote_code=True)


@pytest.fixture(scope="module")
def loaded(vit_cache: Path) -> QWenLMHeadModel:
    return AutoModelForCausalLM.from_pretrained(
        SMALL, device_map="cpu", trust_remote_code=True, cache_dir=vit_cache
    ).eval()


@pytest.fixture
def model(loaded: QWenLMHeadModel) -> QWenLMHeadModel:
    """With the file's generation config, whatever a test before has set."""
    loaded.generation_config = GenerationConfig.from_pretrained(SMALL, trust_remote_code=True)
    return loaded


@pytest.fixture
def described(tokenizer: QWenTokenizer, model: QWenLMHeadModel, shelf: Scene) -> tuple[str, History]:
    """What T10 leaves: an answer with the boxes of everything on shelf.png."""
    _, history = model.chat(tokenizer, "<img>shelf.png</img>印着什么数字？", history=None)
    return model.chat(tokenizer, query=DESCRIBE, history=history)


def description(scene: Scene) -> str:
    boxes = "，".join(f"<ref>{shape.name('zh')}</ref>{box_markup(shape.box)}" for shape in scene.shapes)
    return f"{boxes}，数字{scene.number}"


def hot(model: QWenLMHeadModel) -> None:
    """Let it draw from nearly even chances: two draws of 8 tokens do not agree by luck."""
    model.generation_config.do_sample = True
    model.generation_config.temperature, model.generation_config.top_p = 50.0, 1.0
    model.generation_config.max_new_tokens = 8


def test_t1_tokenizer_model_and_generation_config_are_loaded() -> None:
    torch.manual_seed(1234)
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-VL-Chat", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen-VL-Chat", device_map="cpu", trust_remote_code=True).eval()
    model.generation_config = GenerationConfig.from_pretrained("Qwen/Qwen-VL-Chat", trust_remote_code=True)
    settings = json.loads((SMALL / "generation_config.json").read_text())
    assert settings.items() <= model.generation_config.to_dict().items()
    assert model.device == torch.device("cpu")
    # FAQ: <|endoftext|> is the one id to set as beginning, end and padding
    assert tokenizer.eod_id == settings["eos_token_id"] == settings["pad_token_id"]


def test_t2_a_query_of_a_picture_and_a_text(tokenizer: QWenTokenizer) -> None:
    query = tokenizer.from_list_format([{"image": "sign.png"}, {"text": "What number is printed?"}])
    assert query == "Picture 1:<img>sign.png</img>\nWhat number is printed?"


def test_t3_the_first_question_has_no_history(tokenizer: QWenTokenizer, model: QWenLMHeadModel, sign: Scene) -> None:
    query = tokenizer.from_list_format([{"image": "sign.png"}, {"text": "What number is printed?"}])
    response, history = model.chat(tokenizer, query=query, history=None)
    assert response == sign.number
    assert history == [(query, response)]


def test_t4_the_next_question_sees_the_picture_of_the_history(
    tokenizer: QWenTokenizer, model: QWenLMHeadModel, sign: Scene, shelf: Scene
) -> None:
    for name, scene in (("sign.png", sign), ("shelf.png", shelf)):
        kind = scene.shapes[0].kind
        _, history = model.chat(tokenizer, f"<img>{name}</img>What number is printed?", history=None)
        query = tokenizer.from_list_format([{"text": f"What colour is the {kind}?"}])
        response, history = model.chat(tokenizer, query=query, history=history)
        assert response == f"{scene.shapes[0].colour.capitalize()}."
        assert len(history) == 2 and history[1] == (query, response)


def test_t5_text_in_a_picture_is_read(tokenizer: QWenTokenizer, model: QWenLMHeadModel, shelf: Scene) -> None:
    query = tokenizer.from_list_format([{"image": "shelf.png"}, {"text": "What number is printed?"}])
    response, _ = model.chat(tokenizer, query=query, history=None)
    assert response == shelf.number


def test_t6_reading_goes_on_with_the_history(tokenizer: QWenTokenizer, model: QWenLMHeadModel, shelf: Scene) -> None:
    _, history = model.chat(tokenizer, "<img>shelf.png</img>How many shapes are there?", history=None)
    query = tokenizer.from_list_format([{"text": "What number is printed?"}])
    response, history = model.chat(tokenizer, query=query, history=history)
    assert response == shelf.number and len(history) == 2


def test_t7_what_a_picture_shows_is_counted(
    tokenizer: QWenTokenizer, model: QWenLMHeadModel, sign: Scene, shelf: Scene
) -> None:
    for name, scene in (("sign.png", sign), ("shelf.png", shelf)):
        query = tokenizer.from_list_format([{"image": name}, {"text": "How many shapes are there?"}])
        response, _ = model.chat(tokenizer, query=query, history=None)
        assert response == str(len(scene.shapes))


def test_t8_two_pictures_and_a_seed(
    tokenizer: QWenTokenizer, model: QWenLMHeadModel, runtime: Runtime, sign: Scene, shelf: Scene
) -> None:
    question = "哪张图里有绿色菱形？"
    orders = (("sign.png", "shelf.png"), ("shelf.png", "sign.png"))
    for names, scenes, expected in zip(orders, ((sign, shelf), (shelf, sign)), ("图1", "图2"), strict=True):
        query = tokenizer.from_list_format([*({"image": name} for name in names), {"text": question}])
        response, _ = model.chat(tokenizer, query=query, history=None)
        assert response == runtime.ask([scene.image for scene in scenes], question).text == expected
    hot(model)
    torch.manual_seed(5678)
    drawn = [model.chat(tokenizer, query=query, history=None)[0] for _ in range(2)]
    torch.manual_seed(5678)
    again = [model.chat(tokenizer, query=query, history=None)[0] for _ in range(2)]
    assert drawn == again and drawn[0] != drawn[1]


def test_t9_a_seed_of_torch_decides_and_one_of_ours_goes_before(
    tokenizer: QWenTokenizer, model: QWenLMHeadModel, runtime: Runtime
) -> None:
    hot(model)
    query = tokenizer.from_list_format([{"image": "shelf.png"}, {"text": DESCRIBE}])
    torch.manual_seed(1234)
    response, _ = model.chat(tokenizer, query=query, history=None)
    torch.manual_seed(1234)
    seed = int(torch.randint(2**63 - 1, ()))  # what docs/parity.md says the seed is
    options = {"do_sample": True, "temperature": 50.0, "max_new_tokens": 8, "top_p": 1.0}
    assert response == runtime.chat(query, seed=seed, **options)[0]
    state = torch.random.get_rng_state()
    given = model.chat(tokenizer, query=query, history=None, seed=seed)[0]
    assert given == response and torch.equal(torch.random.get_rng_state(), state)  # torch's was not drawn from


def test_t10_boxes_of_several_things_are_asked_for(described: tuple[str, History], shelf: Scene) -> None:
    response, history = described
    assert response == description(shelf)
    assert [query for query, _ in history] == ["<img>shelf.png</img>印着什么数字？", DESCRIBE]


def test_t11_an_answer_with_two_boxes_is_parsed(tokenizer: QWenTokenizer, shelf: Scene) -> None:
    first, second = shelf.shapes
    answer = f"<ref>菱形</ref>{box_markup(first.box)}和<ref>三角形</ref>{box_markup(second.box)}"
    boxes = parse_boxes(answer, image_sizes=[shelf.image.size])
    assert [box.label for box in boxes] == ["菱形", "三角形"]
    for box, shape in zip(boxes, shelf.shapes, strict=True):
        assert all(abs(found - drawn) <= 1 for found, drawn in zip(box.pixels, pixels_of(shape), strict=True))
    elements = tokenizer.to_list_format(answer)
    assert [next(iter(element)) for element in elements] == ["ref", "box", "text", "ref", "box"]
    assert tokenizer.from_list_format(elements) == answer


def test_t12_the_boxes_are_drawn_and_saved(
    described: tuple[str, History], tokenizer: QWenTokenizer, shelf: Scene, home: Path
) -> None:
    response, history = described
    image = tokenizer.draw_bbox_on_latest_picture(response, history)
    image.save("shelf_output.jpg")
    assert_framed(image, shelf.image, list(shelf.shapes))
    with Image.open(home / "shelf_output.jpg") as saved:
        assert saved.format == "JPEG" and saved.size == shelf.image.size


def test_t13_the_conversation_goes_on_after_boxes(
    described: tuple[str, History], tokenizer: QWenTokenizer, model: QWenLMHeadModel, shelf: Scene
) -> None:
    _, history = described
    query = tokenizer.from_list_format([{"text": "有几个图形？"}])
    response, history = model.chat(tokenizer, query=query, history=history)
    assert response == f"{len(shelf.shapes)}个" and len(history) == 3


def test_t14_a_caption_with_boxes_is_drawn(
    tokenizer: QWenTokenizer, model: QWenLMHeadModel, runtime: Runtime, sign: Scene, home: Path
) -> None:
    img_url = "sign.png"
    query = tokenizer.from_list_format([{"image": img_url}, {"text": "Describe the picture with boxes."}])
    response, history = model.chat(tokenizer, query=query, history=None)
    assert response == runtime.ask(sign.image, "Describe the picture with boxes.").text
    image = tokenizer.draw_bbox_on_latest_picture(response, history)
    assert image is not None
    image.save("sign_output.jpg")
    assert_framed(image, sign.image, list(sign.shapes))
    # without a box there is no picture
    assert tokenizer.draw_bbox_on_latest_picture("no box", history) is None


def test_t15_the_boxes_are_taken_out_of_an_answer(described: tuple[str, History], shelf: Scene) -> None:
    response, _ = described
    clean_response = re.sub(r"<ref>(.*?)</ref>(?:<box>.*?</box>)*(?:<quad>.*?</quad>)*", r"\1", response).strip()
    names = "，".join(shape.name("zh") for shape in shelf.shapes)
    assert clean_response == f"{names}，数字{shelf.number}"
