"""The decoder's shapes in llama.cpp, for benchmarks.cpu_peers: GGUF LAYERS PROMPT POSITIONS THREADS

It imports nothing of this repository, so that llama-cpp-python and gguf may be in an environment of their own. Weights
are random: Q4_0 in the layers and Q8_0 in the head, as an int4 checkpoint with its head in int8. Prints one JSON line.
"""

import importlib
import json
import statistics
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, INNER, HEADS, VOCAB = 4096, 11008, 32, 151_936
DECODED = 20
Array = np.ndarray[Any, Any]


def write(path: Path, layers: int) -> None:
    """A GGUF of architecture "qwen" with random weights."""
    gguf: Any = importlib.import_module("gguf")
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * INNER)  # config.json's intermediate_size
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")

    @cache  # quantizing in numpy is slow, and rows may repeat
    def quantized(outputs: int, inputs: int, kind: Any) -> Array:
        rows = random.standard_normal((128, inputs), dtype=np.float32) / np.float32(inputs**0.5)
        return np.tile(gguf.quants.quantize(rows, kind), (outputs // 128, 1))

    def matrix(name: str, outputs: int, inputs: int, kind: Any = gguf.GGMLQuantizationType.Q4_0) -> None:
        writer.add_tensor(name, quantized(outputs, inputs, kind), raw_dtype=kind)

    def vector(name: str, value: float, size: int) -> None:
        writer.add_tensor(name, np.full(size, value, dtype=np.float32))

    matrix("token_embd.weight", VOCAB, HIDDEN)
    for layer in range(layers):
        block = f"blk.{layer}"
        vector(f"{block}.attn_norm.weight", 1, HIDDEN)
        matrix(f"{block}.attn_qkv.weight", 3 * HIDDEN, HIDDEN)
        vector(f"{block}.attn_qkv.bias", 0, 3 * HIDDEN)
        matrix(f"{block}.attn_output.weight", HIDDEN, HIDDEN)
        vector(f"{block}.ffn_norm.weight", 1, HIDDEN)
        matrix(f"{block}.ffn_gate.weight", INNER, HIDDEN)
        matrix(f"{block}.ffn_up.weight", INNER, HIDDEN)
        matrix(f"{block}.ffn_down.weight", HIDDEN, INNER)
    vector("output_norm.weight", 1, HIDDEN)
    matrix("output.weight", VOCAB, HIDDEN, gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(path: Path, prompt: int, positions: int, threads: int) -> dict[str, Any]:
    """Milliseconds of a prompt, of a decoded token after it, and of one at `positions`."""
    llama: Any = importlib.import_module("llama_cpp")
    model = llama.Llama(
        str(path), n_ctx=positions + 4 * DECODED, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
    )
    ids = np.random.default_rng(1).integers(0, 3000, positions).tolist()

    def timed(tokens: list[int]) -> float:
        start = time.perf_counter()
        model.eval(tokens)
        return 1e3 * (time.perf_counter() - start)

    def decoded() -> float:
        return statistics.median(timed([7]) for _ in range(DECODED))

    timed(ids[:16])
    model.reset()
    first = timed(ids[:prompt])
    early = decoded()
    timed(ids[prompt + DECODED :])
    return {
        "prompt_ms": first, "decode_ms": early, "decode_at_positions_ms": decoded(), "version": llama.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    gguf_path, layers, prompt, positions, threads = Path(sys.argv[1]), *map(int, sys.argv[2:6])
    if not gguf_path.exists():
        write(gguf_path, layers)
    print(json.dumps(measure(gguf_path, prompt, positions, threads)))
