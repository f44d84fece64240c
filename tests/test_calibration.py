import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_small_checkpoint
from PIL import Image
from torch import Tensor

from quantize.calibration import embed_samples
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.errors import CalibrationError, ConfigError
from qvl_edge.model.loading import load_visual
from qvl_edge.text.conversations import _located, digest_of, make_sample, read_samples
from qvl_edge.text.tokenizer import IMG, IMG_END, IMG_PAD, Tokenizer
from qvl_edge.vision.image import load_image, to_pixels

TOLERANCE = 1e-5  # float32 on both sides, pictures one by one against together
OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(
        write_small_checkpoint(tmp_path_factory.mktemp("calibration") / "checkpoint", num_hidden_layers=1)
    )


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer.from_file(checkpoint.path / "qwen.tiktoken")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures below it."""
    (tmp_path / "pictures").mkdir()
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (60, 40), colour).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path


def entry(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    turns = [{"from": roles[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"id": "1", "conversations": turns}


def write(folder: Path, content: Any, name: str = "data.json") -> Path:
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def embed(checkpoint: Checkpoint, samples: list[Any]) -> list[Tensor]:
    """What embed_samples puts; NaN where it puts nothing."""
    embedded = [torch.full((len(sample.ids), checkpoint.config.hidden_size), torch.nan) for sample in samples]

    def put(sample: int, first: int, rows: Tensor) -> None:
        embedded[sample][first : first + len(rows)] = rows

    embed_samples(checkpoint, samples, put, device="cpu", say=lambda text: None)
    return embedded


RED = entry("Picture 1: <img>pictures/red.png</img>\nColour?", "Red.", "And the shape?", "A square.")


def read(file: Path, tokenizer: Tokenizer, samples: int = 128, seqlen: int = 2048, seed: int = 0) -> list[Any]:
    return read_samples(file, tokenizer, samples=samples, seqlen=seqlen, seed=seed)


def test_a_conversation_becomes_the_text_that_the_model_was_trained_on(folder: Path, tokenizer: Tokenizer) -> None:
    (sample,) = read(write(folder, [RED]), tokenizer)
    pad = tokenizer.specials[IMG_PAD]
    assert tokenizer.decode(token for token in sample.ids if token != pad) == (
        f"{OPENING}Picture 1: {IMG}{IMG_END}\nColour?<|im_end|>\n<|im_start|>assistant\nRed."
        "<|im_end|>\n<|im_start|>user\nAnd the shape?<|im_end|>\n<|im_start|>assistant\nA square.<|im_end|>\n"
    )
    (start,) = sample.image_starts
    assert sample.ids.index(pad) == start
    assert sample.ids[start : start + IMAGE_TOKENS] == [pad] * IMAGE_TOKENS
    assert sample.ids.count(pad) == IMAGE_TOKENS


def test_only_a_path_starts_from_the_folder_of_its_file(tmp_path: Path) -> None:
    assert _located("a.png", tmp_path) == str(tmp_path / "a.png")
    for text in ("data:image/png;base64,AA", "https://example.org/a", "file:///a.png", "iVBORw0KGgo" + "A" * 40):
        assert _located(text, tmp_path) == text


def test_features_of_each_picture_stand_in_its_slots_and_embeddings_elsewhere(
    folder: Path, tokenizer: Tokenizer, checkpoint: Checkpoint
) -> None:
    both = entry("<img>pictures/blue.png</img> and <img>pictures/red.png</img>", "Two.")
    samples = read(write(folder, [RED, both, entry("Hello", "Hi")]), tokenizer)
    embedded = embed(checkpoint, samples)
    visual = load_visual(checkpoint, dtype=torch.float32)
    images = [load_image(folder / "pictures" / f"{name}.png") for name in ("red", "blue")]
    with torch.inference_mode():
        red, blue = visual(to_pixels(images, checkpoint.config.visual.image_size))
    table = checkpoint["transformer.wte.weight"].float()
    for sample, x, features in zip(samples, embedded, ([red], [blue, red], []), strict=True):
        expected = table[torch.tensor(sample.ids)]
        for start, feature in zip(sample.image_starts, features, strict=True):
            expected[start : start + IMAGE_TOKENS] = feature
        assert x.dtype == torch.float32
        assert float((x - expected).norm() / expected.norm()) < TOLERANCE


def test_pictures_in_groups_give_the_features_of_the_whole_tower(
    folder: Path, tokenizer: Tokenizer, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five pictures in groups of two, one of them in two samples, against the tower with all its weights."""
    monkeypatch.setattr("quantize.calibration.GROUP", 2)
    noise = torch.Generator().manual_seed(3)
    names = [f"pictures/{number}.png" for number in range(5)]
    for name in names:
        pixels = torch.randint(0, 256, (40, 50, 3), generator=noise, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    entries = [entry("".join(f"<img>{name}</img>" for name in part), "Ok.") for part in (names, names[:1])]
    samples = read(write(folder, entries), tokenizer)
    many, one = embed(checkpoint, samples)
    images = [load_image(folder / name) for name in names]
    with torch.inference_mode():
        expected = load_visual(checkpoint, dtype=torch.float32)(to_pixels(images, checkpoint.config.visual.image_size))
    for start, features in zip(samples[0].image_starts, expected, strict=True):
        found = many[start : start + IMAGE_TOKENS]
        assert float((found - features).norm() / features.norm()) < TOLERANCE
    assert torch.equal(
        one[samples[1].image_starts[0] :][:IMAGE_TOKENS], many[samples[0].image_starts[0] :][:IMAGE_TOKENS]
    )


ASK, RED_PATH, BLUE_PATH = "Which?", "pictures/red.png", "pictures/blue.png"
# one conversation of two turns, a picture in each, in the formats of other projects
FORMATS: dict[str, dict[str, Any]] = {
    "Qwen-VL": entry(
        f"Picture 1: <img>{RED_PATH}</img>\n{ASK}", "Red.", f"Picture 2: <img>{BLUE_PATH}</img>\n{ASK}", "Blue."
    ),
    "LLaVA": {
        "id": "1",
        "image": [RED_PATH, BLUE_PATH],
        "conversations": [
            {"from": "human", "value": f"<image>\n{ASK}"},
            {"from": "gpt", "value": "Red."},
            {"from": "human", "value": f"<image>\n{ASK}"},
            {"from": "gpt", "value": "Blue."},
        ],
    },
    "ms-swift": {
        "query": f"<image>{ASK}",
        "response": "Blue.",
        "history": [[f"<image>{ASK}", "Red."]],
        "images": [{"path": RED_PATH, "bytes": None}, BLUE_PATH],
    },
    "ms-swift, messages": {
        "messages": [
            {"role": "user", "content": f"<image>{ASK}"},
            {"role": "assistant", "content": "Red."},
            {"role": "user", "content": f"<image>{ASK}"},
            {"role": "assistant", "content": "Blue."},
        ],
        "images": [RED_PATH, BLUE_PATH],
    },
    "OpenAI": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": RED_PATH}}, {"type": "text", "text": ASK}],
            },
            {"role": "assistant", "content": "Red."},
            {
                "role": "user",
                "content": [{"type": "image", "image": BLUE_PATH}, {"type": "text", "text": ASK}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "Blue."}]},
        ]
    },
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("file", ["data.json", "data.jsonl", "lines.json", "list.jsonl"])
def test_formats_of_other_projects_give_the_same_samples(
    form: str, file: str, folder: Path, tokenizer: Tokenizer
) -> None:
    (expected,) = read(write(folder, [FORMATS["Qwen-VL"]], "expected.json"), tokenizer)
    as_lines = file in ("data.jsonl", "lines.json")
    content = [FORMATS[form]] * 2
    samples = read(write(folder, "\n".join(map(json.dumps, content)) if as_lines else content, file), tokenizer)
    assert [(one.ids, one.image_starts, one.image_keys) for one in samples] == [
        (expected.ids, expected.image_starts, expected.image_keys)
    ] * 2
    assert len(expected.image_starts) == len(set(expected.image_keys)) == 2


def test_a_system_prompt_and_images_without_a_place_are_kept(folder: Path, tokenizer: Tokenizer) -> None:
    message = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]}
    message["messages"].append({"role": "assistant", "content": "b"})
    swift = {"system": "Be brief.", "query": "a", "response": "b"}
    placed = {"query": "a", "response": "b", "image": RED_PATH}
    first, second, third = read(write(folder, [message, swift, placed]), tokenizer)
    assert first.ids == second.ids
    assert tokenizer.decode(first.ids).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>"
    )
    assert tokenizer.decode(third.ids).startswith(f"{OPENING}Picture 1: {IMG}") and len(third.image_starts) == 1


def test_paths_begin_in_the_folder_of_images(folder: Path, tokenizer: Tokenizer) -> None:
    data = write(folder, [{"query": "a", "response": "b", "images": ["red.png"]}])
    (sample,) = read_samples(data, tokenizer, samples=1, seqlen=2048, seed=0, images=folder / "pictures")
    assert len(sample.images) == 1


def test_samples_that_lose_all_their_images_are_named(folder: Path, tokenizer: Tokenizer) -> None:
    late = entry("x" * 400 + f"<img>{RED_PATH}</img>", "Red.")
    with pytest.warns(UserWarning, match=r"1 of 2 samples are left out, such as .*entry 2: within 400 tokens"):
        assert len(read(write(folder, [RED, late]), tokenizer, seqlen=400)) == 1


def test_pictures_are_found_from_the_files_folder_and_by_absolute_path(folder: Path, tokenizer: Tokenizer) -> None:
    absolute = entry(f"<img>{folder}/pictures/red.png</img>", "Red.")
    (first, second) = read(write(folder, [RED, absolute]), tokenizer)
    assert first.image_keys == second.image_keys


def test_text_lines_are_taken_as_they_are(folder: Path, tokenizer: Tokenizer) -> None:
    lines = write(folder, "One line.\n\n  \n二\n", "lines.txt")
    assert [tokenizer.decode(sample.ids) for sample in read(lines, tokenizer)] == ["One line.", "二"]
    mixed = write(folder, json.dumps({"text": "A <img>pictures/red.png</img>"}) + "\n" + json.dumps(RED), "mixed.jsonl")
    text, conversation = read(mixed, tokenizer)
    assert text.ids[:2] == tokenizer.encode("A ")
    assert len(text.ids) == 2 + IMAGE_TOKENS + 2
    assert tokenizer.decode(conversation.ids).startswith(OPENING)


@pytest.mark.parametrize("seqlen", [1, 20, 300])
def test_long_samples_keep_their_first_tokens(seqlen: int, folder: Path, tokenizer: Tokenizer) -> None:
    file = write(folder, "0123456789" * 50, "lines.txt")
    assert read(file, tokenizer, seqlen=seqlen)[0].ids == tokenizer.encode("0123456789" * 50)[:seqlen]


def test_no_picture_is_ever_cut(folder: Path, tokenizer: Tokenizer) -> None:
    """Two pictures, cut at every length: what is left has whole pictures only, and at least one."""
    turns = [("ab<img>pictures/red.png</img>cd<img>pictures/blue.png</img>ef", "gh")]
    whole = make_sample(tokenizer, turns, seqlen=4096, where="x", folder=folder)
    assert whole is not None
    begin, end, pad = (tokenizer.specials[token] for token in (IMG, IMG_END, IMG_PAD))
    first = whole.image_starts[0]
    for seqlen in (*range(first - 3, first + 3), *range(first + 250, first + 275), *range(first + 510, first + 530)):
        sample = make_sample(tokenizer, turns, seqlen=seqlen, where="x", folder=folder)
        if seqlen < first + IMAGE_TOKENS + 1:
            assert sample is None
            continue
        assert sample is not None
        assert sample.ids == whole.ids[: len(sample.ids)]
        assert len(sample.ids) <= seqlen
        count = len(sample.image_starts)
        assert count == len(sample.images) == len(sample.image_keys) >= 1
        assert sample.ids.count(begin) == sample.ids.count(end) == count
        assert sample.ids.count(pad) == count * IMAGE_TOKENS


def test_a_seqlen_that_holds_no_picture_is_an_error(folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(CalibrationError, match="at 100 tokens no sample keeps an image of 258 tokens whole"):
        read(write(folder, [RED]), tokenizer, seqlen=100)


def test_a_seed_chooses_the_same_subset_in_the_files_order(folder: Path, tokenizer: Tokenizer) -> None:
    file = write(folder, "\n".join(f"line {index:02d}" for index in range(50)), "lines.txt")
    first, again, other = (
        [tokenizer.decode(sample.ids) for sample in read(file, tokenizer, samples=8, seed=seed)] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first == sorted(first)
    assert len(set(first)) == 8


def test_the_digest_tells_texts_and_pictures_apart_but_not_folders(folder: Path, tokenizer: Tokenizer) -> None:
    def digest() -> str:
        return digest_of(read(write(folder, [RED]), tokenizer))

    before = digest()
    moved = folder / "moved"
    moved.mkdir()
    (folder / "pictures").rename(moved / "pictures")
    assert digest_of(read(write(moved, [RED]), tokenizer)) == before
    Image.new("RGB", (60, 40), (200, 30, 31)).save(moved / "pictures" / "red.png")
    assert digest_of(read(write(moved, [RED]), tokenizer)) != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([entry("Hi", "Ho"), entry("Only a question")], r"entry 2: the last question has no assistant answer"),
        ([entry("Hi", "Ho", "And?")], r"entry 1: the last question has no assistant answer"),
        ([entry("Hi", "  ")], r'entry 1: turn 2 has no "value"'),
        ([{"conversations": [{"from": "tool", "value": "Hi"}]}], r"entry 1: turn 1 is \"from\" 'tool'"),
        ([{**entry("<image>a<image>b", "Ho"), "images": ["a.png"]}], "has 1 images and 2 <image>"),
        ([{**entry("<image>a", "Ho"), "images": ["a.png", "b.png"]}], "has 2 images and 1 <image>"),
        ([entry("<image>a", "Ho")], "has 0 images and 1 <image>"),
        ([{**entry("Hi", "<image>Ho"), "image": "a.png"}], "turn 2 is an answer with an image"),
        ([{**entry("Hi", "Ho"), "videos": ["a.mp4"]}], "has 'videos', which would be lost"),
        ([{**entry("Hi", "Ho"), "images": [{"bytes": "x"}]}], "has an image that is None, expected a path"),
        ([{"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}], "turn 1 has the part .*input_audio"),
        ([{"query": "Hi", "response": "Ho", "history": ["x"]}], r"history holds something else than \[query"),
        ([{"query": "Hi"}], 'has neither "conversations", "messages", "query" and "response"'),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}],
            "turn 2 is from system, expected assistant",
        ),
        ([{"conversations": [{"from": "assistant", "value": "Hi"}]}], r"turn 1 is from assistant, expected user"),
        ([entry("Hi", "Ho"), {"conversations": []}], r"entry 2 has neither"),
        (["Hi"], r"entry 1 has neither"),
        ([entry("<img>pictures/none.png</img>", "Ho")], r"entry 1: .*none\.png"),
        ([entry("<img>pictures/red.png", "Ho")], r"entry 1: .*left open"),
        ([entry("<img>https://example.com/a.png</img>", "Ho")], r"entry 1: .*URL"),
        ({"conversations": []}, r"is a JSON dict, expected a list"),
        ([], r"is empty"),
        ("", r"is empty"),
        ("[{", r"is not valid JSON"),
    ],
)
def test_a_bad_file_is_refused_with_the_entry(content: Any, message: str, folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(CalibrationError, match=message):
        read(write(folder, content), tokenizer)


def test_a_bad_line_is_refused_with_its_number(folder: Path, tokenizer: Tokenizer) -> None:
    file = write(folder, '{"text": "a"}\n\n{"text": 3}\n', "lines.jsonl")
    with pytest.raises(CalibrationError, match=r"lines\.jsonl line 3 has neither"):
        read(file, tokenizer)
    with pytest.raises(CalibrationError, match=r"lines\.jsonl, line 2 is not valid JSON"):
        read(write(folder, '{"text": "a"}\noops', "lines.jsonl"), tokenizer)


def test_files_that_cannot_be_read_are_refused(folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(CalibrationError, match=r"none\.json cannot be read"):
        read(folder / "none.json", tokenizer)
    with pytest.raises(CalibrationError, match=r"ends in '\.csv'"):
        read(write(folder, "a", "data.csv"), tokenizer)
    (folder / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        read(folder / "latin.txt", tokenizer)


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = Checkpoint(write_small_checkpoint(tmp_path / "other", num_hidden_layers=1, vocab_size=640))
    read = Tokenizer.from_folder(other.path, other.config)  # padding rows of the embedding are fine
    assert read.vocab_size == tokenizer.vocab_size < other.config.vocab_size
    section = json.loads((other.path / "config.json").read_text())
    section["visual"]["image_start_id"] = 400
    (other.path / "config.json").write_text(json.dumps(section))
    with pytest.raises(ConfigError, match="<img> at 470.*image_start_id 400"):
        Tokenizer.from_folder(other.path, Checkpoint(other.path).config)
