"""Arguments that `run` and `chat` share, and loading a Runtime from them."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any, get_args

from qvl_edge.options import PROFILES, Embeddings, Head, KVType

if TYPE_CHECKING:
    from qvl_edge.runtime import Runtime


def add_arguments(parser: argparse.ArgumentParser, *, optional_path: bool = False) -> None:
    """The model, how it is loaded, and how it generates. optional_path: the command has other names for BUNDLE too."""
    nargs = "?" if optional_path else None
    parser.add_argument("path", metavar="BUNDLE", nargs=nargs, help="a bundle, a checkpoint, or OWNER/NAME on a hub")
    add_source(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto: CUDA where there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the arithmetic (float32, on CUDA float16)"
    )
    parser.add_argument(
        "--profile",
        choices=("auto", *PROFILES),
        default="auto",
        help="12g: nothing beyond int4 is lost; 8g: vision tower, lm_head and cache in int8; 6g: the tower in int4; "
        "auto: the first that fits into free memory (default)",
    )
    parser.add_argument("--max-context", type=int, metavar="N", help="positions to allow (as many as fit)")
    parser.add_argument("--max-memory", metavar="8GB", help="take no more than this instead of all that is free")
    parser.add_argument("--kv-cache", choices=get_args(KVType), help="keys and values: as --dtype, or int8")
    parser.add_argument("--head", choices=get_args(Head), help="lm_head: as --dtype, or int8")
    parser.add_argument(
        "--embeddings", choices=get_args(Embeddings), default="host", help="the table: in the mapped file, or on device"
    )
    parser.add_argument("--vision-device", help="where images are encoded: cpu, cuda or cuda:N (as --device)")
    parser.add_argument(
        "--release-vision", action="store_true", help="have the vision tower in memory only while it encodes"
    )
    parser.add_argument(
        "--lookup", type=int, default=0, metavar="N", help="guess N tokens at once from earlier text, exactly (0: off)"
    )
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


def add_source(parser: argparse.ArgumentParser) -> None:
    """Which hub a name that is no folder here is looked up on."""
    parser.add_argument(
        "--source", choices=("hf", "modelscope"), default="hf", help="the hub of a model that is named (hf)"
    )
    parser.add_argument("--revision", metavar="R", help="its branch, tag or commit (the hub's default branch)")


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
        profile=args.profile,
        max_context=args.max_context,
        slots=getattr(args, "slots", 1),
        max_memory=args.max_memory,
        kv_cache=args.kv_cache,
        head=args.head,
        embeddings=args.embeddings,
        vision_device=args.vision_device,
        release_vision=args.release_vision,
        lookup=args.lookup,
        verify=args.verify,
        source=args.source,
        revision=args.revision,
        progress=say,
    )
    say(f"loaded {args.path} in {time.perf_counter() - began:.1f} s")
    return runtime


def say(line: str) -> None:
    """A line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)
