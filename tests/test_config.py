"""config.json and quantize_config.json: published files are read, contradictions are refused."""

import json
from dataclasses import replace

import pytest
from conftest import DATA, SMALL

from qvl_edge import published
from qvl_edge.config import Config, QuantConfig
from qvl_edge.errors import ConfigError


def test_the_published_configs_are_read_as_published() -> None:
    chat = Config.from_folder(DATA / "published/Qwen-VL-Chat")
    assert (chat.hidden_size, chat.ffn_size, chat.num_hidden_layers, chat.torch_dtype) == (4096, 11008, 32, "bfloat16")
    assert (chat.visual.width, chat.visual.mlp_width, chat.visual.patches) == (1664, 8192, 1024)
    assert chat.quantization is None
    int4 = Config.from_folder(DATA / "published/Qwen-VL-Chat-Int4")
    assert int4.quantization == QuantConfig(bits=4, group_size=128, damp_percent=0.01, desc_act=False, sym=True)


def test_quantize_config_survives_a_round_trip() -> None:
    quant = QuantConfig(bits=8, group_size=-1, desc_act=True, sym=False, checkpoint_format="gptq_v2")
    assert QuantConfig.from_dict(json.loads(json.dumps(quant.to_dict()))) == quant


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 192}, ("2 heads of 64", "128", "192")),
        ({"hidden_size": "128"}, ("hidden_size", "'128'", "integer")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers", "0")),
        ({"model_type": "llama"}, ("llama", "qwen")),
        ({"visual": None}, ("no visual section",)),
        ({"tie_word_embeddings": True}, ("tie_word_embeddings", "True", "False")),
        ({"quantization_config": 4}, ("config.json:quantization_config", "4", "object")),
        ({"quantization_config": {"bits": 3}}, ("config.json:quantization_config: bits", "3", "4 and 8")),
        ({"torch_dtype": "int8"}, ("torch_dtype", "int8")),
        ({"visual": {**SMALL["visual"], "output_dim": 256}}, ("256", "128")),
        ({"visual": {**SMALL["visual"], "image_size": 57}}, ("57", "14")),
        ({"visual": {k: v for k, v in SMALL["visual"].items() if k != "width"}}, ("width",)),
    ],
)
def test_a_contradiction_names_both_sides(change: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict({**SMALL, **change})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"bits": 3},
            {"group_size": 48},
            {"damp_percent": 0},
            {"quant_method": "awq"},
            {"checkpoint_format": "marlin"},
        ),
        *({"lm_head": True}, {"pack_dtype": "int8"}, {"dynamic": {"-:.*mlp.*": {}}}),
    ],
)
def test_an_unsupported_quantization_is_refused_by_name(change: dict) -> None:
    with pytest.raises(ConfigError, match=f"quantize_config.json: {next(iter(change))}"):
        QuantConfig.from_dict(change)
    with pytest.raises(ConfigError, match=f"config.json:quantization_config: {next(iter(change))}"):
        Config.from_dict({**SMALL, "quantization_config": change})


def test_an_option_that_came_from_no_file_names_none() -> None:
    with pytest.raises(ConfigError, match="^damp_percent is 2"):
        QuantConfig(damp_percent=2)


# what GPTQModel 7.6 and transformers 4.44 write beside the settings that say what the tensors are
GPTQMODEL = {"lm_head": False, "quant_method": "gptq", "method": "gptq", "format": "gptq_v2", "pack_dtype": "int32"} | {
    "meta": {"quantizer": ["gptqmodel:7.6.0"], "act_group_aware": True, "mse": 0.0}
}
TRANSFORMERS = {
    "tokenizer": None,
    "dataset": None,
    "damp_percent": 0.1,
    "sym": None,
    "modules_in_block_to_quantize": None,
}


def test_settings_of_gptqmodel_and_transformers_are_read() -> None:
    read = QuantConfig.from_dict({"bits": 4, "group_size": 64, "desc_act": False, **GPTQMODEL, "sym": False})
    assert read == QuantConfig(group_size=64, sym=False, checkpoint_format="gptq_v2")
    assert QuantConfig.from_dict({"bits": 8, **TRANSFORMERS}) == QuantConfig(bits=8, damp_percent=0.1)
    assert Config.from_dict({**SMALL, "torch_dtype": None, "dtype": "bfloat16"}).torch_dtype == "bfloat16"


def test_the_two_files_of_a_quantized_model_may_not_contradict_one_another() -> None:
    section = {**SMALL, "quantization_config": {"bits": 4, "checkpoint_format": "gptq_v2"}}
    found = Config.from_dict(section, {"bits": 4, "group_size": 32}).quantization
    assert found == QuantConfig(group_size=32, checkpoint_format="gptq_v2")
    with pytest.raises(ConfigError, match="checkpoint_format is 'gptq', config.json:quantization_config has 'gptq_v2'"):
        Config.from_dict(section, {"bits": 4, "checkpoint_format": "gptq"})


def test_a_missing_or_broken_config_names_the_file(tmp_path) -> None:
    with pytest.raises(ConfigError, match="config.json is missing"):
        Config.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        Config.from_folder(tmp_path)


def test_the_published_settings_that_ship_are_those_of_the_published_files() -> None:
    chat, int4 = DATA / "published/Qwen-VL-Chat", DATA / "published/Qwen-VL-Chat-Int4"
    for file, ours in {
        chat / "config.json": published.CONFIG,
        chat / "generation_config.json": published.GENERATION,
        int4 / "quantize_config.json": published.QUANTIZATION,
    }.items():
        theirs = json.loads(file.read_text())
        assert ours == {key: theirs[key] for key in ours}
    assert published.published_config("Qwen/Qwen-VL-Chat") == Config.from_folder(chat)
    found = published.published_config("Qwen/Qwen-VL-Chat-Int4")
    assert found is not None
    assert replace(found, torch_dtype="float16") == Config.from_folder(int4)
