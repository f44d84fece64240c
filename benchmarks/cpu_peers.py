"""A CPU's decoder beside llama.cpp's, of the published shapes and random weights.

    python -m benchmarks.cpu_peers FOLDER [--layers 8] [--json FILE]

FOLDER gets a synthetic Int4 checkpoint and GGUF files as llama-quantize makes them for Q4_0 (lm_head in Q6_K), and
keeps them. Needs `pip install llama-cpp-python gguf`. Both run with the same number of threads, in turns, on 1 and on
--layers layers; what the published 32 take is extrapolated from the two. int8 head and cache here, float16 cache there.
The checkpoint has two layers, which are run in turn: 216 MB, which no cache holds.
"""

import ctypes
import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch

from benchmarks.report import add_save, command, exits_with_its_message, save, say
from benchmarks.synthetic import write_synthetic
from kernels.sessions import set_threads
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config
from qvl_edge.markdown import table
from qvl_edge.model.cache import KVCache
from qvl_edge.model.loading import load_decoder
from qvl_edge.options import Activations
from qvl_edge.published import CONFIG

LAYERS = CONFIG["num_hidden_layers"]
CASES = {"decode": (1, 293), "decode at 2,000": (1, 2000), "prompt of 293": (293, 0)}  # tokens, position of the first
ROUNDS = {1: 12, 293: 5}
CONTEXT = 2048
Run = Callable[[int, int], float]
"""Computes so many tokens from a position on; returns the seconds."""


def ours(checkpoint: Path, layers: int, activations: Activations) -> Run:
    """The runtime's decoder, its layers in turn until there are `layers`."""
    model = load_decoder(
        Checkpoint(checkpoint), dtype=torch.float32, head="int8", embeddings="host", activations=activations
    )
    stored = list(model.transformer.h)
    model.transformer.h = torch.nn.ModuleList(stored[index % len(stored)] for index in range(layers))
    config = replace(model.config, num_hidden_layers=layers)
    cache = KVCache(config, 1, CONTEXT, dtype=torch.int8, block=model.cache_block)
    for tensor in (cache.k, cache.v, cache.k_scales, cache.v_scales):
        cast(torch.Tensor, tensor).fill_(1)

    @torch.inference_mode()
    def run(tokens: int, start: int) -> float:
        cache.clear()
        cache.advance(start)
        began = time.perf_counter()
        model(model.embed(torch.arange(tokens)[None]), cache)
        return time.perf_counter() - began

    return run


def llama(path: Path, threads: int) -> Run:
    """llama.cpp over a GGUF; its cache holds 2,000 positions of the same prompt."""
    import llama_cpp as ll

    ll.llama_backend_init()
    ll.llama_log_set(_quiet(), None)
    options = ll.llama_model_default_params()
    model = ll.llama_model_load_from_file(str(path).encode(), options)
    settings = ll.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, 512, 512
    settings.n_threads = settings.n_threads_batch = threads
    context = ll.llama_init_from_model(model, settings)
    memory = ll.llama_get_memory(context)

    def compute(tokens: int) -> None:
        ids = (ctypes.c_int32 * tokens)(*range(tokens))  # which the batch only points to
        if ll.llama_decode(context, ll.llama_batch_get_one(ids, tokens)):
            raise RuntimeError(f"llama.cpp could not decode {tokens} tokens")

    def run(tokens: int, start: int) -> float:
        ll.llama_memory_seq_rm(memory, 0, start, -1)
        while (there := ll.llama_memory_seq_pos_max(memory, 0) + 1) < start:
            compute(min(500, start - there))
        began = time.perf_counter()
        compute(tokens)
        return time.perf_counter() - began

    return run


@functools.cache
def _quiet() -> Any:
    """What llama.cpp calls with each of its 150 lines; kept, for it calls it later too."""
    import llama_cpp as ll

    return ll.llama_log_callback(lambda *_: None)


def write_gguf(path: Path, config: Config, layers: int) -> None:
    """Random Q4_0 weights in the architecture "qwen", without a vocabulary."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen")
    hidden, inner = config.hidden_size, config.ffn_size
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * inner)  # llama.cpp halves it, as the published intermediate_size
    writer.add_rope_freq_base(config.rotary_emb_base)
    writer.add_rope_dimension_count(config.kv_channels)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    generator = np.random.default_rng(0)

    def matrix(name: str, outputs: int, inputs: int, kind: str = "Q4_0") -> None:
        block, size, scale = (32, 18, 0) if kind == "Q4_0" else (256, 210, 208)  # where a block's float16 scale is
        data = generator.integers(0, 256, (outputs, inputs // block, size), dtype=np.uint8)
        data[..., scale : scale + 2] = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
        writer.add_tensor(f"{name}.weight", data.reshape(outputs, -1), raw_dtype=gguf.GGMLQuantizationType[kind])

    def vector(name: str, size: int, value: float) -> None:
        writer.add_tensor(name, np.full(size, value, np.float32))

    matrix("token_embd", config.vocab_size, hidden)
    matrix("output", config.vocab_size, hidden, "Q6_K")
    vector("output_norm.weight", hidden, 1)
    for index in range(layers):
        block = f"blk.{index}"
        vector(f"{block}.attn_norm.weight", hidden, 1)
        vector(f"{block}.ffn_norm.weight", hidden, 1)
        vector(f"{block}.attn_qkv.bias", 3 * hidden, 0)
        matrix(f"{block}.attn_qkv", 3 * hidden, hidden)
        matrix(f"{block}.attn_output", hidden, hidden)
        matrix(f"{block}.ffn_gate", inner, hidden)
        matrix(f"{block}.ffn_up", inner, hidden)
        matrix(f"{block}.ffn_down", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@exits_with_its_message("benchmarks.cpu_peers")
def main(arguments: list[str] | None = None) -> None:
    parser = command("cpu_peers", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for the models: 6 GB")
    parser.add_argument("--layers", type=int, default=8, help="of the larger model (default: 8)")
    parser.add_argument("--threads", type=int, help="of both (default: the cores that this process may use)")
    add_save(parser)
    args = parser.parse_args(arguments)
    set_threads(args.threads)
    threads, folder = torch.get_num_threads(), args.folder
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "int4"
    if not checkpoint.exists():
        settings = CONFIG | {"num_hidden_layers": 2, "visual": CONFIG["visual"] | {"layers": 1}}
        write_synthetic(checkpoint, settings, int4=True)
    found: dict[str, dict[str, list[float]]] = {}
    for layers in (1, args.layers):
        path = folder / f"q4_0-{layers}.gguf"
        if not path.exists():
            write_gguf(path, Config.from_folder(checkpoint), layers)
        runs = {
            "llama.cpp, Q4_0": llama(path, threads),
            "float activations": ours(checkpoint, layers, "float"),
            "int8 activations": ours(checkpoint, layers, "int8"),
        }
        for case, (tokens, start) in CASES.items():
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(ROUNDS[tokens]):
                for name, run in runs.items():
                    run(tokens, start)  # threads of the one before may still spin
                    times[name].append(run(tokens, start))
            for name, values in times.items():
                found.setdefault(name, {}).setdefault(case, []).append(median(values))
                say(f"{layers} layers, {case}, {name}: {median(values) * 1e3:.1f} ms")
    rows: list[dict[str, Any]] = []
    for name, cases in found.items():
        for case, (one, more) in cases.items():
            whole = one + (LAYERS - 1) * (more - one) / (args.layers - 1)
            rows.append({"name": name, "case": case, "one_layer": one, "layers": more, "seconds": whole})
    speeds = {
        name: [f"{CASES[row['case']][0] / row['seconds']:.2f}" for row in rows if row["name"] == name] for name in found
    }
    print(table(["tokens/s", *CASES], [[name, *columns] for name, columns in speeds.items()]))
    save(args.json, "cpu_peers", "cpu", layers_measured=[1, args.layers], rows=rows)


if __name__ == "__main__":
    main()
