"""Long conversations: memory growth over a thousand turns, and answers compared with fresh runs.

    python -m benchmarks.soak PATH [--turns 1000] [--images 100] [--json FILE]

Conversations of one to six turns over the synthetic scenes, each turn a follow-up question or a question about another
image. The features of 32 images and the keys and values of one conversation are cached, so both caches keep evicting.
Memory is read after every turn, after glibc has returned freed memory, which otherwise varies by 50 MB; the slope is a
least-squares fit of the second half, when everything has been allocated. Every --compare-th answer is generated again
by a runtime with empty caches.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.report import exits_with_its_message, model_command, save, say
from qvl_edge import Runtime
from qvl_edge.demo.scenes import UNSEEN, ask_any, make_scene
from qvl_edge.memory import resident_bytes, trim_heap
from qvl_edge.options import LoadOptions

MAX_TURNS = 6  # of a conversation


def turns(count: int, images: int) -> Iterator[tuple[list[dict[str, Any]], bool]]:
    """(query, starts a new conversation) of every turn."""
    rng = np.random.default_rng(0)
    scenes: dict[int, Any] = {}
    left = 0
    for _ in range(count):
        new = left == 0
        left = int(rng.integers(1, MAX_TURNS + 1)) - 1 if new else left - 1
        query: list[dict[str, Any]] = []
        if new or rng.random() < 0.3:
            number = int(rng.integers(images))
            scene = scenes.setdefault(number, make_scene(UNSEEN + number))
            query.append({"image": scene.image})
        yield [*query, {"text": ask_any(scene, rng).text}], new


def soak(runtime: Runtime, fresh: Runtime, count: int, images: int, compare: int) -> dict[str, Any]:
    """Run the turns; SystemExit if an answer differs from a fresh one."""
    memory, reused, prompt, compared = [], 0, 0, 0
    history: list[tuple[Any, str]] = []
    for index, (query, new) in enumerate(turns(count, images)):
        history = [] if new else history
        answer = runtime.answer(query, history, do_sample=False, max_new_tokens=96)
        if index % compare == 0:
            fresh.forget()
            expected = fresh.answer(query, history, do_sample=False, max_new_tokens=96)
            if expected.token_ids != answer.token_ids:
                raise SystemExit(f"turn {index}: {answer.text!r}, but {expected.text!r} from a fresh run")
            compared += 1
        history.append((query, answer.text))
        reused, prompt = reused + answer.usage.cached_tokens, prompt + answer.usage.prompt_tokens
        trim_heap()
        memory.append(resident_bytes())
        if (index + 1) % 100 == 0:
            say(f"{index + 1} turns, {memory[-1] / 1e6:.1f} MB")
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


@exits_with_its_message("benchmarks.soak")
def main(arguments: list[str] | None = None) -> None:
    parser = model_command("soak", __doc__, device="cpu", max_context=4096)
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--compare", type=int, default=1, metavar="N", help="every N-th answer with a fresh run (1)")
    args = parser.parse_args(arguments)
    runtime, fresh = (Runtime.from_pretrained(args.path, **LoadOptions.given(args)) for _ in range(2))
    found = soak(runtime, fresh, args.turns, args.images, args.compare)
    print(
        f"{found['turns']} turns, {found['images']} images, {found['compared']} answers equal those of a fresh run\n"
        f"prompt tokens reused: {found['reused_share']:.0%}\n"
        f"memory: {found['start_bytes'] / 1e6:.1f} MB after the first turn, {found['half_bytes'] / 1e6:.1f} half-way, "
        f"{found['end_bytes'] / 1e6:.1f} at the end; slope of the second half "
        f"{found['slope_bytes_a_turn'] / 1e3:+.2f} kB per turn"
    )
    save(args.json, "soak", runtime.plan.device, **found)


if __name__ == "__main__":
    main()
