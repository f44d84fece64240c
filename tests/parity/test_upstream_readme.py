"""The snippets of Qwen-VL's README.md and README_CN.md, by their number in docs/parity.md.

Imports come from qvl_edge.compat, pictures and questions are ours; calls and names of arguments are upstream's. The
English and the Chinese file have the same code, so a test asks in the language of its file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from snippets import ROOT, SMALL

from export import vit
from quantize import gptq
from qvl_edge import Bundle, ConfigError, ImageError, Runtime
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.compat import (
    AutoModelForCausalLM,
    AutoPeftModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    snapshot_download,
)
from qvl_edge.demo.scenes import Scene, box_markup
from qvl_edge.lora import LoraCheckpoint
from qvl_edge.text.boxes import parse_boxes
from qvl_edge.text.conversations import read_samples

from .conftest import CAPTION_TOKENS, assert_framed, pixels_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("at_home")]
READ = {"README.md": "What number is printed?", "README_CN.md": "印着什么数字？"}
FIND = {"README.md": "Find the {}.", "README_CN.md": "框出{}。"}
LANGUAGE = {"README.md": "en", "README_CN.md": "zh"}
UPSTREAMS_PACKAGES = (
    "transformers accelerate einops transformers_stream_generator scipy torchvision tensorboard matplotlib optimum "
    "auto_gptq peft deepspeed gradio modelscope huggingface_hub"
).split()
both = pytest.mark.parametrize("file", LANGUAGE)


def test_r1_nothing_of_upstreams_requirements_is_imported() -> None:
    """R1, R6 and R15: neither requirements.txt, nor AutoGPTQ, nor gradio is needed, for an Int4 checkpoint either."""
    program = f"""
import sys
sys.modules.update(dict.fromkeys({UPSTREAMS_PACKAGES!r}))  # None: importing it fails
import qvl_edge.server.app
from qvl_edge.compat import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-VL-Chat-Int4", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen-VL-Chat-Int4", device_map="cpu", trust_remote_code=True).eval()
print(model.chat(tokenizer, "<img>sign.png</img>What number is printed?", history=None)[0])
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.strip() == "443", done.stderr


@both
def test_r2_chat_in_two_turns_and_a_box(file: str, sign: Scene, home: Path) -> None:
    torch.manual_seed(1234)
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-VL-Chat", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen-VL-Chat", device_map="cpu", trust_remote_code=True).eval()
    model.generation_config = GenerationConfig.from_pretrained("Qwen/Qwen-VL-Chat", trust_remote_code=True)

    query = tokenizer.from_list_format([{"image": "sign.png"}, {"text": READ[file]}])
    response, history = model.chat(tokenizer, query=query, history=None)
    assert response == sign.number and history == [(query, response)]

    diamond = sign.shapes[1]
    question = FIND[file].format(diamond.name(LANGUAGE[file]))
    response, history = model.chat(tokenizer, question, history=history)
    (box,) = parse_boxes(response, image_sizes=[sign.image.size])
    assert box.label == diamond.name(LANGUAGE[file])
    # a coordinate is cut to a thousandth of the side: at most 0.45 of a pixel
    assert all(abs(found - drawn) <= 1 for found, drawn in zip(box.pixels, pixels_of(diamond), strict=True))
    assert [q for q, _ in history] == [query, question]
    image = tokenizer.draw_bbox_on_latest_picture(response, history)
    assert image
    image.save("1.jpg")
    assert_framed(image, sign.image, [diamond])
    with Image.open(home / "1.jpg") as saved:
        assert saved.format == "JPEG" and saved.size == sign.image.size


@pytest.mark.parametrize("flag", ["bf16", "fp16"])
def test_r2_precision_flags_are_the_arithmetics(flag: str, home: Path, sign: Scene) -> None:
    """The lines that the snippets of R2, R3 and R5 have as comments; "auto" is a GPU where there is one."""
    model = AutoModelForCausalLM.from_pretrained(
        "Qwen/Qwen-VL-Chat", device_map="auto", trust_remote_code=True, **{flag: True}
    ).eval()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[flag]
    assert model.dtype == model.runtime.decoder.lm_head.weight.dtype == dtype
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-VL-Chat", trust_remote_code=True)
    assert model.chat(tokenizer, f"<img>sign.png</img>{READ['README.md']}", history=None)[0] == sign.number


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the snippets' default line works")
@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", {"": 0}, 0])
def test_r2_without_a_gpu_the_line_for_one_says_so(device_map: object) -> None:
    with pytest.raises(ConfigError, match=r"sees no CUDA device.*device='cpu'"):
        AutoModelForCausalLM.from_pretrained("Qwen/Qwen-VL-Chat", device_map=device_map, trust_remote_code=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_r2_on_a_gpu_the_line_for_one_answers(sign: Scene) -> None:
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-VL-Chat", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen-VL-Chat", device_map="cuda", trust_remote_code=True).eval()
    assert model.device.type == "cuda" and model.cuda() is model
    assert model.chat(tokenizer, f"<img>sign.png</img>{READ['README.md']}", history=None)[0] == sign.number


def test_r2_a_url_is_refused_and_nothing_is_fetched() -> None:
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-VL-Chat", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen-VL-Chat", device_map="cpu", trust_remote_code=True).eval()
    query = tokenizer.from_list_format([{"image": "https://example.com/a.jpeg"}, {"text": READ["README.md"]}])
    with pytest.raises(ImageError, match="is a URL; nothing is fetched here. Download it"):
        model.chat(tokenizer, query=query, history=None)


@both
def test_r3_the_base_model_continues_token_ids_with_a_box(file: str, sign: Scene, runtime: Runtime) -> None:
    torch.manual_seed(1234)
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-VL", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen-VL", device_map="cpu", trust_remote_code=True).eval()
    triangle = sign.shapes[0]
    # the small model was taught questions, not captions: the caption's first phrase is given, its box is the model's
    caption = [{"text": "Caption with boxes:"}, {"ref": triangle.name(LANGUAGE[file])}]
    query = tokenizer.from_list_format([{"image": "sign.png"}, *caption])
    inputs = tokenizer(query, return_tensors="pt")
    inputs = inputs.to(model.device)
    pred = model.generate(**inputs)
    response = tokenizer.decode(pred.cpu()[0], skip_special_tokens=False)
    assert response == query + box_markup(triangle.box)
    expected = runtime.answer(
        [{"image": sign.image}, *caption], chat_format="raw", do_sample=False, max_new_tokens=CAPTION_TOKENS
    )
    assert pred[0, inputs.input_ids.shape[1] :].tolist() == expected.token_ids
    image = tokenizer.draw_bbox_on_latest_picture(response)
    assert image
    image.save("2.jpg")
    assert_framed(image, sign.image, [triangle])
    with pytest.raises(ConfigError, match="chat_format is 'raw'"):  # upstream asserts this too
        model.chat(tokenizer, query, history=None)


@pytest.fixture
def modelscope(
    monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path, sign: Scene, shelf: Scene
) -> list[tuple[str, str]]:
    """What ModelScope's client is asked for; a stand-in for it that has the small model. Nothing is in the folder but
    the pictures: a folder with the model's name would be taken."""
    asked: list[tuple[str, str]] = []

    class HubApi:
        def list_repo_files(self, name: str, kind: str, *, revision: str) -> list[SimpleNamespace]:
            files = (path for path in SMALL.iterdir() if path.is_file())
            return [SimpleNamespace(path=f.name, size=f.stat().st_size, sha256=None, type="blob") for f in files]

        def download_repo(
            self, name: str, kind: str, *, revision: str, local_files_only: bool = False, **options: object
        ) -> str:
            if local_files_only and not asked:
                raise errors.CacheNotFound
            if not local_files_only:
                asked.append((name, revision))
            return str(SMALL)

    names = ("NotExistError", "AuthenticationError", "PermissionDeniedError", "CacheNotFound")
    errors = SimpleNamespace(**{name: type(name, (Exception,), {}) for name in names})
    client = SimpleNamespace(
        HubApi=HubApi, errors=errors, get_default_config=lambda: SimpleNamespace(cache_dir=str(tmp_path / "hub"))
    )
    monkeypatch.setitem(sys.modules, "modelscope_hub", client)
    for name in ("sign.png", "shelf.png"):
        (tmp_path / name).write_bytes((home / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    return asked


def test_r4_a_folder_from_modelscope_is_loaded(modelscope: list, sign: Scene) -> None:
    model_dir = snapshot_download("qwen/Qwen-VL-Chat")
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(model_dir, device_map="cpu", trust_remote_code=True).eval()
    assert modelscope == [("qwen/Qwen-VL-Chat", "master")]
    query = tokenizer.from_list_format([{"image": "sign.png"}, {"text": READ["README.md"]}])
    assert model.chat(tokenizer, query=query, history=None)[0] == sign.number


def test_r5_modelscopes_names_download_load_chat_and_draw(modelscope: list, shelf: Scene) -> None:
    model_id = "qwen/Qwen-VL-Chat"
    revision = "v1.0.0"
    model_dir = snapshot_download(model_id, revision=revision)
    torch.manual_seed(1234)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True)
    if not hasattr(tokenizer, "model_dir"):
        tokenizer.model_dir = model_dir
    model = AutoModelForCausalLM.from_pretrained(model_dir, device_map="auto", trust_remote_code=True, fp16=True).eval()
    model = AutoModelForCausalLM.from_pretrained(model_dir, device_map="auto", trust_remote_code=True).eval()
    assert modelscope == [(model_id, revision)]
    image_path, triangle = "shelf.png", shelf.shapes[1]
    for file, language in LANGUAGE.items():
        response, history = model.chat(tokenizer, query=f"<img>{image_path}</img>{READ[file]}", history=None)
        assert response == shelf.number
        name = triangle.name(language)
        response, history = model.chat(tokenizer, FIND[file].format(name), history=history)
        assert response == f"<ref>{name}</ref>{box_markup(triangle.box)}"
        image = tokenizer.draw_bbox_on_latest_picture(response, history)
        assert image
        image.save("output_chat.jpg")
        assert_framed(image, shelf.image, [triangle])


@both
def test_r7_the_int4_checkpoint_chats_as_usual(file: str, sign: Scene) -> None:
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-VL-Chat-Int4", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        "Qwen/Qwen-VL-Chat-Int4", device_map="auto", trust_remote_code=True
    ).eval()
    assert model.runtime.config.quantization is not None and model.runtime.config.quantization.bits == 4
    image_path = "sign.png"
    response, _ = model.chat(tokenizer, query=f"<img>{image_path}</img>{READ[file]}", history=None)
    assert response == sign.number


def test_r9_conversations_of_finetuning_are_calibration_data(home: Path, sign: Scene) -> None:
    conversations = [
        [("Who are you?", "A small Qwen-VL.")],
        [
            ("Picture 1: <img>sign.png</img>\nWhat number is printed?", str(sign.number)),
            ("Find the red circle.", f"<ref>red circle</ref>{box_markup(sign.shapes[2].box)}"),
        ],
        [("Picture 1: <img>sign.png</img>\nPicture 2: <img>shelf.png</img>\nWhich is which?", "A sign and a shelf.")],
    ]
    entries = [
        {
            "id": f"identity_{number}",
            "conversations": [
                {"from": role, "value": value}
                for turn in turns
                for role, value in zip(("user", "assistant"), turn, strict=True)
            ],
        }
        for number, turns in enumerate(conversations)
    ]
    (home / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-VL-Chat")
    samples = read_samples(home / "data.json", tokenizer.core, samples=3, seqlen=2048, seed=0)
    assert [[Path(str(image)).name for image in sample.images] for sample in samples] == [
        [],
        ["sign.png"],
        ["sign.png", "shelf.png"],
    ]
    for sample, turns in zip(samples, conversations, strict=True):
        said = tokenizer.decode(sample.ids)
        assert all(answer in said for _, answer in turns)
    assert all(sample.ids.count(tokenizer.img_pad_id) == 256 * len(sample.images) for sample in samples)


def test_r10_what_a_full_finetune_saves_is_loaded_as_it_is(home: Path, sign: Scene) -> None:
    """R8 and R10: training is upstream's; its result, a folder with pytorch_model shards, needs no conversion."""
    source, folder = Checkpoint(SMALL), home / "output_qwen"
    folder.mkdir()
    weight_map = {}
    for number, names in enumerate((source.names[::2], source.names[1::2]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: source[name].clone() for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("config.json", "generation_config.json", "qwen.tiktoken"):
        (folder / name).write_bytes((SMALL / name).read_bytes())
    tokenizer = AutoTokenizer.from_pretrained("output_qwen", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained("output_qwen", device_map="cpu", trust_remote_code=True).eval()
    assert model.chat(tokenizer, f"<img>sign.png</img>{READ['README.md']}", history=None)[0] == sign.number


def test_r13_an_adapter_is_merged_as_it_is_loaded_and_into_a_bundle(
    home: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R11 and R13: an adapter that finetune.py leaves is merged as it is loaded, and while a bundle is made."""
    adapter, base = home / "adapter", Checkpoint(small_checkpoint)
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["w1"]}
    settings["base_model_name_or_path"] = str(small_checkpoint)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name in (name for name in base.names if name.endswith("mlp.w1.weight")):
        n_out, n_in = base.shape(name)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, n_in, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(n_out, 4, generator=generator)
    save_file(tensors, adapter / "adapter_model.safetensors")

    model = AutoPeftModelForCausalLM.from_pretrained("adapter", device_map="cpu", trust_remote_code=True).eval()
    merged, w1 = LoraCheckpoint(small_checkpoint, adapter), "transformer.h.1.mlp.w1"
    assert torch.equal(model.runtime.decoder.get_submodule(w1).weight, merged[f"{w1}.weight"].float())
    assert not torch.equal(merged[f"{w1}.weight"], base[f"{w1}.weight"])
    for main, more in ((gptq.main, ["--round-to-nearest", "--group-size", "64"]), (vit.main, [])):
        assert main([str(small_checkpoint), "BUNDLE", "--lora", "adapter", *more]) == 0, capsys.readouterr().err
    # one fingerprint for both halves, and it is that of the base with the adapter
    assert Bundle.open(home / "BUNDLE").fingerprint == LoraCheckpoint(small_checkpoint, adapter).fingerprint
