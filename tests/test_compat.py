"""Upstream's names: snippets of Qwen-VL's README run with the import line changed."""

import json
from pathlib import Path

import pytest
import torch
from conftest import DATA, GOLDEN

from qvl_edge import ConfigError, PromptError
from qvl_edge.compat import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, QWenTokenizer
from qvl_edge.text.tokenizer import Tokenizer

CHECKPOINT = GOLDEN / "tiny-a/checkpoint"


@pytest.fixture(scope="module")
def tokenizer() -> QWenTokenizer:
    return AutoTokenizer.from_pretrained(str(CHECKPOINT), trust_remote_code=True)


@pytest.fixture(scope="module")
def model(vit_cache: Path):
    return AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, device_map="cpu", trust_remote_code=True, cache_dir=vit_cache
    ).eval()


def test_ids_with_image_paths_equal_upstreams_errors_included(full_size: Tokenizer) -> None:
    tokenizer, cases = QWenTokenizer(full_size), json.loads((DATA / "tokenizer.json").read_text())
    compared = 0
    for case in cases["encode"]:
        if isinstance(case["ids"], dict):
            with pytest.raises(PromptError):  # a ValueError, as upstream's
                tokenizer.encode(case["text"])
        else:
            assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        compared += 1
    for case in cases["decode"]:
        assert tokenizer.decode(case["ids"]) == case["text"]
        compared += 1
    assert compared == 26


def test_the_chat_snippet_runs(tokenizer, model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN / "tiny-a/images")
    model.generation_config = GenerationConfig.from_pretrained(CHECKPOINT, trust_remote_code=True)
    model.generation_config.max_new_tokens = 5
    query = tokenizer.from_list_format([{"image": "scene0_RGB.png"}, {"text": "这是什么?"}])
    assert query == "Picture 1:<img>scene0_RGB.png</img>\n这是什么?"
    response, history = model.chat(tokenizer, query=query, history=None, seed=1)
    assert isinstance(response, str) and history == [(query, response)]
    _, longer = model.chat(tokenizer, "框出图中的圆", history=history, seed=1)
    assert [q for q, _ in longer] == [query, "框出图中的圆"] and longer is history
    streamed = list(model.chat_stream(tokenizer, query, history=None, seed=1))
    assert streamed[-1].strip() == response
    picture = tokenizer.draw_bbox_on_latest_picture("<ref>圆</ref><box>(1,1),(500,500)</box>", history)
    assert picture.size[0] > 0


def test_the_base_model_snippet_runs_on_ids(tokenizer, model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN / "tiny-a/images")
    query = tokenizer.from_list_format(
        [{"image": "scene0_RGB.png"}, {"text": "Generate the caption in English with grounding:"}]
    )
    inputs = tokenizer(query, return_tensors="pt").to(model.device)
    assert inputs.input_ids.shape == inputs["attention_mask"].shape
    pred = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert torch.equal(pred[:, : inputs.input_ids.shape[1]], inputs.input_ids)
    text = tokenizer.decode(pred.cpu()[0], skip_special_tokens=False)
    assert text.startswith(query)
    direct = model.runtime.generate(query, do_sample=False, max_new_tokens=4)
    assert pred[0, inputs.input_ids.shape[1] :].tolist() == direct.token_ids
    assert tokenizer.draw_bbox_on_latest_picture(query + "<ref>a</ref><box>(1,1),(500,500)</box>") is not None


@pytest.mark.slow
def test_precision_flags_are_upstreams_and_exclude_one_another(vit_cache: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(CHECKPOINT, device_map="cpu", bf16=True, cache_dir=vit_cache)
    assert half.runtime.decoder.lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="at most one"):
        AutoModelForCausalLM.from_pretrained(CHECKPOINT, bf16=True, fp16=True)


def test_without_append_history_the_list_stays(tokenizer, model) -> None:
    history = [("a", "b")]
    _, same = model.chat(tokenizer, "c", history=history, append_history=False, max_new_tokens=1)
    assert same is history and history == [("a", "b")]


def test_a_loaded_model_is_where_it_is_and_says_how_to_load_it_elsewhere(model) -> None:
    assert model.to("cpu") is model.cpu() is model.float() is model.to(torch.float32) is model
    for move, words in (
        (model.cuda, r"device_map='cuda'"),
        (lambda: model.cuda(1), r"device_map='cuda:1'"),
        (model.half, r"torch_dtype=torch\.float16"),
        (model.bfloat16, r"torch_dtype=torch\.bfloat16"),
    ):
        with pytest.raises(ConfigError, match=f"is on cpu in torch.float32 and stays so; load it with {words}"):
            move()


def test_a_device_map_names_one_device(vit_cache: Path) -> None:
    options = {"use_safetensors": True, "low_cpu_mem_usage": True, "torch_dtype": torch.float32, "cache_dir": vit_cache}
    whole = AutoModelForCausalLM.from_pretrained(CHECKPOINT, device_map={"": torch.device("cpu")}, **options)
    assert whole.device.type == "cpu" and whole.dtype == torch.float32
    with pytest.raises(ConfigError, match=r"has the parts transformer\.wte, lm_head; the model is on one device"):
        AutoModelForCausalLM.from_pretrained(CHECKPOINT, device_map={"transformer.wte": 0, "lm_head": 1})
    with pytest.raises(ConfigError, match="at most one of bf16, fp16, fp32 and torch_dtype"):
        AutoModelForCausalLM.from_pretrained(CHECKPOINT, fp16=True, torch_dtype="bfloat16")


def test_what_a_generation_config_leaves_open_is_as_in_transformers() -> None:
    given = GenerationConfig(max_new_tokens=5).to_dict()
    assert given == {
        "max_new_tokens": 5,
        "do_sample": False,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
    }


def test_an_option_with_an_unknown_name_is_an_error(tokenizer, model) -> None:
    with pytest.raises(ConfigError, match="unknown generation option 'num_beams'"):
        model.chat(tokenizer, "a", history=None, num_beams=4)
