"""A thousand turns about a hundred pictures: does memory stay flat, and is every answer that of a fresh run?

    python -m benchmarks.soak PATH [--turns 1000] [--images 100] [--json FILE]

Conversations of one to six turns over the synthetic scenes, with a follow-up question, another picture, or a new start.
The features of 32 pictures are kept, and the keys and values of one conversation: both caches turn over all the
time. Memory is read after every turn, once glibc has let go of what was freed: what it keeps comes and goes by 50 MB.
The slope is a least-squares line through the second half, when everything has
been allocated. Every --compare-th answer is given again by a runtime that forgets everything first.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from qvl_edge import Runtime
from qvl_edge.demo.scenes import UNSEEN, ask, make_scene
from qvl_edge.machine import describe_machine, ends_with_its_message
from qvl_edge.memory import resident_bytes, trim_heap

KINDS = ("find", "count", "read", "describe", "at")
LONGEST = 6  # turns of a conversation


def turns(count: int, images: int, seed: int = 0) -> Any:
    """(query, whether it starts a new conversation) of every turn."""
    rng = np.random.default_rng(seed)
    scenes: dict[int, Any] = {}
    left = 0
    for _ in range(count):
        new = left == 0
        left = int(rng.integers(1, LONGEST + 1)) - 1 if new else left - 1
        query: list[dict[str, Any]] = []
        if new or rng.random() < 0.3:
            number = int(rng.integers(images))
            scene = scenes.setdefault(number, make_scene(UNSEEN + number))
            query.append({"image": scene.image})
        question = None
        while question is None:
            question = ask(scene, str(rng.choice(KINDS)), str(rng.choice(["en", "zh"])), rng)
        yield [*query, {"text": question.text}], new


def soak(runtime: Runtime, fresh: Runtime, count: int, images: int, compare: int) -> dict[str, Any]:
    """Run the turns; SystemExit at the first answer that differs from a fresh one."""
    memory, reused, prompt, compared = [], 0, 0, 0
    history: list[tuple[Any, str]] = []
    for index, (query, new) in enumerate(turns(count, images)):
        history = [] if new else history
        answer = runtime.answer(query, history, do_sample=False, max_new_tokens=96)
        if index % compare == 0:
            fresh.forget()
            expected = fresh.answer(query, history, do_sample=False, max_new_tokens=96)
            if expected.token_ids != answer.token_ids:
                raise SystemExit(f"turn {index}: {answer.text!r}, and {expected.text!r} from a fresh run")
            compared += 1
        history.append((query, answer.text))
        reused, prompt = reused + answer.usage.cached_tokens, prompt + answer.usage.prompt_tokens
        trim_heap()
        memory.append(resident_bytes())
        if (index + 1) % 100 == 0:
            print(f"{index + 1} turns, {memory[-1] / 1e6:.1f} MB", file=sys.stderr, flush=True)
    half = memory[len(memory) // 2 :]
    slope = float(np.polyfit(np.arange(len(half)), half, 1)[0]) if len(half) > 1 else 0.0
    return {
        "turns": count,
        "images": images,
        "compared": compared,
        "reused_share": reused / prompt,
        "start_bytes": memory[0],
        "half_bytes": half[0],
        "end_bytes": memory[-1],
        "most_bytes": max(memory),
        "slope_bytes_a_turn": slope,
        "memory_bytes": memory[:: max(1, count // 100)],
    }


@ends_with_its_message("benchmarks.soak")
def main(arguments: list[str] | None = None) -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="a bundle or checkpoint of the small model")
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--compare", type=int, default=1, metavar="N", help="every N-th answer with a fresh run (1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="save the figures, with machine, versions, commit and date")
    args = parser.parse_args(arguments)
    runtimes = [Runtime.from_pretrained(args.path, device=args.device, max_context=4096) for _ in range(2)]
    found = soak(*runtimes, args.turns, args.images, args.compare)
    print(
        f"{found['turns']} turns, {found['images']} pictures, {found['compared']} answers equal those of a fresh run\n"
        f"prompt tokens that were reused: {found['reused_share']:.0%}\n"
        f"memory: {found['start_bytes'] / 1e6:.1f} MB after the first turn, {found['half_bytes'] / 1e6:.1f} half way, "
        f"{found['end_bytes'] / 1e6:.1f} at the end; slope of the second half "
        f"{found['slope_bytes_a_turn'] / 1e3:+.2f} kB a turn"
    )
    if args.json:
        args.json.write_text(json.dumps({"benchmark": "soak", **describe_machine(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
