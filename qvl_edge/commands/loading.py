"""Arguments that `run` and `chat` share, and loading a Runtime from them."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl_edge.runtime import Runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, how it is loaded, and how it generates."""
    parser.add_argument("path", metavar="BUNDLE", help="a bundle, or an untouched checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto: CUDA where there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the arithmetic (float32, on CUDA float16)"
    )
    parser.add_argument(
        "--kv-cache", choices=("float16", "int8"), default="float16", help="keys and values: as --dtype, or int8"
    )
    parser.add_argument(
        "--head", choices=("float16", "int8"), default="float16", help="lm_head: as --dtype, or int8 (CUDA)"
    )
    parser.add_argument("--vision-device", choices=("cpu", "cuda"), help="where images are encoded (as --device)")
    parser.add_argument("--max-context", type=int, metavar="N", help="positions to allow (the model's)")
    parser.add_argument("--verify", action="store_true", help="check the hash of every file of the bundle first")
    group = parser.add_argument_group("generation (defaults are the model's)")
    group.add_argument("--max-new-tokens", type=int, metavar="N")
    group.add_argument(
        "--greedy", dest="do_sample", action="store_false", default=None, help="always the likeliest token"
    )
    group.add_argument("--temperature", type=float, metavar="T")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--repetition-penalty", type=float, metavar="R")
    group.add_argument("--seed", type=int, metavar="S")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable")


def generation_of(args: argparse.Namespace) -> dict[str, Any]:
    """The generation options that were given."""
    names = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def load(args: argparse.Namespace) -> "Runtime":
    """The Runtime, with progress on stderr."""
    from qvl_edge.runtime import Runtime  # imports torch

    began = time.perf_counter()
    runtime = Runtime.from_pretrained(
        args.path,
        device=args.device,
        dtype=args.dtype,
        max_context=args.max_context,
        kv_cache=args.kv_cache,
        head=args.head,
        vision_device=args.vision_device,
        verify=args.verify,
        progress=say,
    )
    say(f"loaded {args.path} in {time.perf_counter() - began:.1f} s")
    return runtime


def say(line: str) -> None:
    """A line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)
