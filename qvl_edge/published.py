"""The published models' settings, for questions about a model before any of its files has been fetched.

Source: config.json and generation_config.json of Qwen/Qwen-VL-Chat, quantize_config.json of Qwen/Qwen-VL-Chat-Int4.
Qwen/Qwen-VL has the sizes of Qwen-VL-Chat.
"""

from typing import Any

from qvl_edge.config import Config

SYSTEM = "You are a helpful assistant."  # the system prompt of Qwen-VL-Chat and of its fine-tuning (finetune.py)
CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "torch_dtype": "bfloat16",
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
    "vocab_size": 151936,
}
QUANTIZATION: dict[str, Any] = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.01,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
}
GENERATION: dict[str, Any] = {
    "chat_format": "chatml",
    "do_sample": True,
    "eos_token_id": 151643,
    "max_new_tokens": 512,
    "max_window_size": 6144,
    "pad_token_id": 151643,
    "top_k": 0,
    "top_p": 0.3,
}
NAMES = ("Qwen/Qwen-VL", "Qwen/Qwen-VL-Chat", "Qwen/Qwen-VL-Chat-Int4")


def published_config(name: str) -> Config | None:
    """The Config of a published model by its name (one of NAMES); None for another name."""
    if name not in NAMES:
        return None
    return Config.from_dict(CONFIG, QUANTIZATION if name.endswith("Int4") else None)
