"""Upstream's names: snippets of Qwen-VL's README run with the import line changed."""

import json
from pathlib import Path

import pytest
import torch
from conftest import DATA, GOLDEN

from qvl_edge import ConfigError, PromptError
from qvl_edge.compat import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, QWenTokenizer
from qvl_edge.compat.model import _device
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
    assert _device("balanced") == _device(None) == "auto"
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


# what upstream's evaluation scripts and transformers' users write around the arguments that matter
NEUTRAL = {
    "num_beams": 1, "length_penalty": 1, "num_return_sequences": 1, "use_cache": True, "early_stopping": False,
    "output_hidden_states": True, "return_dict_in_generate": False, "no_repeat_ngram_size": 0, "logits_processor": [],
    "synced_gpus": False, "typical_p": 1.0, "stopping_criteria": None, "streamer": None, "min_new_tokens": 1,
    "guidance_scale": 1.0, "encoder_repetition_penalty": 1.0, "stream": False, "cache_implementation": "static",
    "disable_compile": True, "max_time": None, "assistant_early_exit": None,
}  # fmt: skip


def test_arguments_that_cannot_change_an_answer_are_taken_and_others_named(tokenizer, model) -> None:
    inputs = tokenizer("hi", return_tensors="pt", add_special_tokens=True, truncation=True, max_length=99)
    assert dict(tokenizer("hi", allowed_special="all", disallowed_special=(), stride=0)) == dict(tokenizer("hi"))
    same = AutoTokenizer.from_pretrained(
        CHECKPOINT,
        use_fast=False,
        legacy=True,
        model_max_length=2048,
        pad_token="<|endoftext|>",
        truncation_side="left",
    )
    assert dict(same("hi", truncation=True)) == dict(tokenizer("hi")) and same.model_max_length == 2048
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=3)
    eod = tokenizer.eod_id
    same = model.generate(**inputs, do_sample=False, max_new_tokens=3, pad_token_id=eod, eos_token_id=[eod], **NEUTRAL)
    assert torch.equal(same, plain)
    assert torch.equal(model.generate(inputs=inputs.input_ids, do_sample=False, max_length=plain.shape[1]), plain)
    settings = GenerationConfig(do_sample=False, max_new_tokens=3, num_beams=1)
    assert torch.equal(model.generate(inputs.input_ids, generation_config=settings), plain)
    settings.num_beams = 4
    for call, words in (
        (lambda: model.chat(tokenizer, "a", history=None, num_beams=4), "num_beams is 4, only 1 is supported"),
        (lambda: model.generate(**inputs, generation_config=settings), "num_beams is 4"),
        (lambda: model.generate(**inputs, num_return_sequences=2), "num_return_sequences is 2.*another seed"),
        (
            lambda: model.generate(**inputs, return_dict_in_generate=True),
            "return_dict_in_generate is True.*runtime.score",
        ),
        (lambda: model.generate(**inputs, eos_token_id=7), r"eos_token_id is 7, the model's is \d+.*stop="),
        (lambda: model.generate(**inputs, max_length=1), "max_length is 1, the prompt has 2 tokens"),
        (lambda: model.generate(**inputs, no_such_thing=1), "unknown generation option 'no_such_thing'"),
        (lambda: model.generate(inputs.input_ids[0]), r"shape \(B, T\)"),
        (lambda: tokenizer("a", no_such_thing=1), "unknown tokenizer option 'no_such_thing'"),
        (lambda: tokenizer("a", text_pair="b"), "text_pair is 'b', only None"),
        (lambda: tokenizer("abc", truncation=True, max_length=1), r"has \d tokens and max_length is 1"),
        (lambda: tokenizer("a", padding="no"), "padding is 'no'"),
        (lambda: model.generate(**inputs, stop_strings=["a"], tokenizer=tokenizer), r"stop_strings is .*stop="),
        (lambda: tokenizer("a", allowed_special=()), r"allowed_special is \(\), only 'all'"),
        (lambda: QWenTokenizer(tokenizer.core, model_max_length=1)("abc", truncation=True), "max_length is 1"),
        (lambda: tokenizer(["a", "abc"], return_tensors="pt"), "1, 2 tokens, which make no tensor; padding=True"),
        (lambda: tokenizer.decode([1], no_such_thing=1), "unknown option 'no_such_thing' of decode"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_part_in_the_answers_of_a_batch(side: str, tokenizer, model) -> None:
    """As upstream's evaluate_vqa.py: a batch padded to the longest, each answer cut off behind the prompts."""
    texts = ["hi", "what is this?", "a"]
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, padding_side=side, trust_remote_code=True)
    inputs = tokenizer(texts, return_tensors="pt", padding="longest")
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert inputs.attention_mask.sum(1).tolist() == lengths
    shortest = inputs.attention_mask[2]
    assert int(shortest[-1 if side == "left" else 0]) == 1 and int(shortest.sum()) == lengths[2] < len(shortest)
    found = model.generate(**inputs, do_sample=False, max_new_tokens=6, pad_token_id=tokenizer.pad_token_id)
    assert torch.equal(found[:, : inputs.input_ids.shape[1]], inputs.input_ids)
    for text, row in zip(texts, found[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
        alone = model.runtime.generate(text, do_sample=False, max_new_tokens=6).token_ids
        assert row == alone + [tokenizer.eod_id] * (len(row) - len(alone))
    assert tokenizer.batch_decode(inputs.input_ids, skip_special_tokens=True) == texts
    assert tokenizer(texts)["input_ids"] == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode(texts[0], return_tensors="pt").tolist() == [tokenizer.encode(texts[0])]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[1, 0, 1]], "row 0 .* zeros between ones"),
        ([[0, 0, 0]], "only zeros"),
        ([[1, 1]], r"\(1, 2\), input_ids \(1, 3\)"),
    ],
)
def test_a_mask_that_is_no_padding_is_refused(mask: list[list[int]], words: str, model) -> None:
    with pytest.raises(ConfigError, match=words):
        model.generate(torch.tensor([[5, 6, 7]]), attention_mask=torch.tensor(mask))


def test_loading_takes_transformers_names_and_refuses_what_it_cannot_do(vit_cache: Path) -> None:
    options = {"attn_implementation": "sdpa", "load_in_4bit": False, "quantization_config": None, "use_cache": True}
    options |= {"use_flash_attention_2": True, "weights_only": True, "subfolder": "", "token": True, "mirror": None}
    options |= {"output_loading_info": False, "code_revision": None, "offload_buffers": True}
    model = AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, device_map="cpu", dtype=torch.float32, torch_dtype="float32", cache_dir=vit_cache, **options
    )
    assert model.to(device="cpu", dtype=torch.float32).requires_grad_(False).eval() is model
    for options, words in (
        ({"load_in_4bit": True}, "load_in_4bit is True, only False is supported; .*python -m quantize.gptq"),
        ({"quantization_config": object()}, "quantization_config is .*python -m quantize.gptq"),
        ({"token": "hf_secret"}, "^token is given, .*HF_TOKEN"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"dtype": "float16", "torch_dtype": torch.float32}, "at most one"),
        ({"no_such_thing": 1}, "unknown loading option 'no_such_thing'"),
    ):
        with pytest.raises(ConfigError, match=words):
            AutoModelForCausalLM.from_pretrained(CHECKPOINT, device_map="cpu", **options)


def test_an_option_with_an_unknown_name_is_an_error(tokenizer, model) -> None:
    with pytest.raises(ConfigError, match="unknown generation option 'temprature'; did you mean 'temperature'"):
        model.chat(tokenizer, "a", history=None, temprature=4)


def test_chat_needs_no_generation_config_but_a_base_model_refuses_it(
    tokenizer, vit_cache: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors", "qwen.tiktoken"):
        (tmp_path / name).symlink_to(CHECKPOINT / name)
    load = {"device_map": "cpu", "cache_dir": vit_cache}
    with pytest.warns(UserWarning, match="generation_config.json is missing, so text is continued"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **load)
    assert model.chat(tokenizer, "hi", history=None, max_new_tokens=1)[1]
    (tmp_path / "generation_config.json").write_text('{"chat_format": "raw"}')
    base = AutoModelForCausalLM.from_pretrained(tmp_path, **load)
    with pytest.raises(ConfigError, match="chat_format is 'raw'.*a base model"):
        base.chat(tokenizer, "hi", history=None)
    told = AutoModelForCausalLM.from_pretrained(tmp_path, chat_format="chatml", **load)
    assert told.chat(tokenizer, "hi", history=None, max_new_tokens=1)[1]
