"""Arguments of transformers' functions: those without effect here, and those refused, with what to do instead."""

from collections.abc import Mapping
from typing import Any

from qvl_edge.errors import ConfigError

ANY = object()
"""Stands for every value."""

# of from_pretrained: how files are read, and what this package decides by itself
LOADING: dict[str, Any] = {
    **dict.fromkeys(("trust_remote_code", "use_safetensors", "low_cpu_mem_usage", "resume_download"), ANY),
    **dict.fromkeys(("use_fast", "user_agent", "attn_implementation", "use_flash_attn", "use_cache"), ANY),
    **dict.fromkeys(("offload_folder", "offload_state_dict", "offload_buffers", "_fast_init", "weights_only"), ANY),
    **dict.fromkeys(("_attn_implementation", "use_flash_attention_2", "use_cache_kernel", "softmax_in_fp32"), ANY),
    **dict.fromkeys(("legacy", "truncation_side"), ANY),
    **dict.fromkeys(("force_download", "load_in_4bit", "load_in_8bit", "use_cache_quantization"), False),
    **dict.fromkeys(("output_loading_info", "ignore_mismatched_sizes", "from_tf", "from_flax"), False),
    **dict.fromkeys(("config", "quantization_config", "variant", "proxies"), None),
    **dict.fromkeys(("token", "use_auth_token"), True),  # the one that is stored
    **dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>"),
    "subfolder": "",
}
# of generate: values with which an answer is what it would be without them
GENERATION: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "typical_p", "guidance_scale"), 1),
    "encoder_repetition_penalty": 1,
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "penalty_alpha", "diversity_penalty"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_length"), 0),
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits", "stream"), False),
    # with one beam, and ids alone in the result, these decide nothing
    **dict.fromkeys(("length_penalty", "early_stopping", "output_attentions", "output_hidden_states"), ANY),
    **dict.fromkeys(("use_cache", "synced_gpus", "bos_token_id", "remove_invalid_values", "renormalize_logits"), ANY),
    **dict.fromkeys(("tokenizer", "disable_compile", "cache_implementation", "prompt_lookup_num_tokens"), ANY),
    **dict.fromkeys(("logits_processor", "stopping_criteria", "bad_words_ids", "stop_words_ids"), []),
    **dict.fromkeys(("streamer", "assistant_model", "prefix_allowed_tokens_fn", "force_words_ids"), None),
    **dict.fromkeys(("stop_strings", "max_time"), None),
}
_INSTEAD = {
    "load_in_4bit": "make an int4 bundle once, with python -m quantize.gptq, and load that",
    "load_in_8bit": "load with profile='8g', or make an int4 bundle with python -m quantize.gptq",
    "quantization_config": "make an int4 bundle once, with python -m quantize.gptq, and load that",
    "config": "change config.json in the model's folder",
    **dict.fromkeys(("token", "use_auth_token"), "set HF_TOKEN or MODELSCOPE_API_TOKEN"),
    **dict.fromkeys(("stop_words_ids", "stop_strings"), "give the texts as stop=[...]"),
    "stream": "use chat_stream",
    "streamer": "use chat_stream, or runtime.answer_stream",
    "num_return_sequences": "call generate again with another seed",
    "return_dict_in_generate": "runtime.score gives log-probabilities",
    "output_scores": "runtime.score gives log-probabilities",
    "output_logits": "runtime.score gives log-probabilities",
}


def without_neutral(given: Mapping[str, Any], neutral: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without arguments that change nothing. ConfigError for another value of one of them."""
    left = {}
    for name, value in given.items():
        if name not in neutral:
            left[name] = value
        elif value is not None and neutral[name] is not ANY and not _same(value, neutral[name]):
            instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
            given_as = "given" if "token" in name else repr(value)[:80]  # a secret is not repeated
            raise ConfigError(f"{name} is {given_as}, only {neutral[name]!r} is supported{instead}")
    return left


def without_none(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without arguments that are left to their defaults."""
    return {name: value for name, value in given.items() if value is not None}


def _same(value: Any, neutral: Any) -> bool:
    if neutral is True:
        return isinstance(value, bool)
    return not len(value) if neutral == [] and hasattr(value, "__len__") else bool(value == neutral)


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """ConfigError for options of a function that only fetches files, which would be dropped."""
    if unknown := sorted(without_none(without_neutral(options, LOADING))):
        where = "; caches are those of HF_HOME and MODELSCOPE_CACHE" if "cache_dir" in unknown else ""
        raise ConfigError(f"{', '.join(unknown)} cannot be chosen here{where}")
