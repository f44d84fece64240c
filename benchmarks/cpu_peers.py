"""The decoder on a CPU beside llama.cpp: python -m benchmarks.cpu_peers PATH --python PYTHON --gguf FILE [--json FILE]

PATH is a checkpoint of benchmarks.synthetic --int4, of all layers or fewer. PYTHON has llama-cpp-python and gguf
installed; the GGUF, of the same shapes, is written if it is not there (benchmarks/llama_peer.py). Each runs in a
process of its own, one after another: a prompt, tokens after it, and tokens at many positions, in milliseconds.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import llama_peer, report
from kernels import Activations
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.model.cache import KVCache
from qvl_edge.model.decoder import place_sequence
from qvl_edge.model.loading import load_decoder

OURS: dict[str, tuple[Activations, torch.dtype]] = {  # activations of the products, and the cache
    "float": ("float", torch.float32),
    "float, int8 cache": ("float", torch.int8),
    "int8": ("int8", torch.float32),
    "int8, int8 cache": ("int8", torch.int8),
}
FIGURES = ("prompt_ms", "decode_ms", "decode_at_positions_ms")


@torch.inference_mode()
def measure(path: str, activations: Activations, prompt: int, positions: int) -> dict[str, dict[str, float]]:
    """Figures of our decoder with an int8 head, by the dtype of its cache."""
    model = load_decoder(Checkpoint(path), dtype=torch.float32, head="int8", embeddings="host", activations=activations)
    ids = torch.randint(0, 3000, (1, prompt), generator=torch.Generator().manual_seed(1))

    def at(cache: KVCache, start: int, tokens: int) -> Callable[[], float]:
        def step() -> float:
            cache.lengths.fill_(start)
            cache.filled.fill_(start)
            began = time.perf_counter()
            model(model.embed(ids[:, :tokens]), cache)
            return 1e3 * (time.perf_counter() - began)

        return step

    found = {}
    for name, (kind, dtype) in OURS.items():
        if kind != activations:
            continue
        cache = KVCache(model.config, 1, positions + 1, dtype=dtype)
        for tensor in (cache.k, cache.v, cache.k_scales, cache.v_scales):
            if tensor is not None:
                tensor.fill_(1)
        place_sequence(model.config, cache, 0, prompt)
        at(cache, 0, 16)()
        steps = at(cache, 0, prompt), at(cache, prompt, 1), at(cache, positions, 1)
        counts = 1, llama_peer.DECODED, llama_peer.DECODED
        found[name] = {
            figure: statistics.median(step() for _ in range(count))
            for figure, step, count in zip(FIGURES, steps, counts, strict=True)
        }
    return found


def _run(*command: str) -> Any:
    """The last line, JSON, of a process. SystemExit with what it wrote if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    report.say(line := done.stdout.splitlines()[-1])
    return json.loads(line)


def main(arguments: list[str] | None = None) -> None:
    parser = report.command("cpu_peers", __doc__)
    parser.add_argument("path", metavar="PATH", help="a checkpoint of benchmarks.synthetic --int4")
    parser.add_argument("--python", default=sys.executable, help="one with llama-cpp-python and gguf (default: this)")
    parser.add_argument("--gguf", metavar="FILE", help="of the same layers; written if it is not there")
    parser.add_argument("--prompt", type=int, default=293, help="tokens: an image and a question (default: 293)")
    parser.add_argument("--positions", type=int, default=2000, help="that are filled (default: 2000)")
    parser.add_argument("--activations", choices=("float", "int8"), help="measure this process's decoder only")
    report.add_save(parser)
    args = parser.parse_args(arguments)
    if args.activations is not None:
        print(json.dumps(measure(args.path, args.activations, args.prompt, args.positions)))
        return
    layers = Checkpoint(args.path).config.num_hidden_layers
    sizes = (str(args.prompt), str(args.positions))
    peers: dict[str, dict[str, Any]] = {}
    if args.gguf is not None:
        threads = str(torch.get_num_threads())
        peers["llama.cpp"] = _run(args.python, llama_peer.__file__, args.gguf, str(layers), *sizes, threads)
    for activations in ("float", "int8"):
        command = (sys.executable, "-m", "benchmarks.cpu_peers", args.path, "--activations", activations)
        peers |= _run(*command, "--prompt", sizes[0], "--positions", sizes[1])
    report.print_machine("cpu")
    print(f"{layers} layers and the head, ms: a prompt of {args.prompt} tokens, a token, one at {args.positions}.\n")
    print(report.table(["", *FIGURES], [[name, *(f"{peer[f]:.1f}" for f in FIGURES)] for name, peer in peers.items()]))
    report.save(args.json, "cpu_peers", "cpu", layers=layers, prompt=args.prompt, positions=args.positions, peers=peers)


if __name__ == "__main__":
    main()
