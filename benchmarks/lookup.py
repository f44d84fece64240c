"""Speed-up by prompt-lookup decoding: the same greedy answers with and without it.

    python -m benchmarks.lookup PATH [--lookup 7] [--scenes 20] [--json FILE]

Descriptions of synthetic scenes and repeated questions about them; each answer is generated both ways, in turn, and
must have the same tokens. The gain depends on how repetitive answers are, and on the cost of a step of several tokens.
"""

import statistics
from typing import Any

import numpy as np

from benchmarks.report import exits_with_its_message, model_command, save
from qvl_edge import Runtime
from qvl_edge.demo.scenes import UNSEEN, ask, make_scene
from qvl_edge.options import LoadOptions


def measure(runtimes: dict[str, Runtime], scenes: int, rounds: int) -> dict[str, Any]:
    """Tokens per second and per step of "plain" and "lookup"; SystemExit if a token differs."""
    rates: dict[str, list[float]] = {name: [] for name in runtimes}
    tokens, steps = 0, 0
    real = runtimes["lookup"].engine.slots.advance

    def counted() -> Any:
        nonlocal steps
        steps += 1
        return real()

    runtimes["lookup"].engine.slots.advance = counted  # type: ignore[method-assign]
    for turn in range(rounds + 1):  # the first is a warm-up
        total = dict.fromkeys(runtimes, 0.0)
        tokens = steps = 0
        for index in range(scenes):
            scene, rng = make_scene(UNSEEN + index), np.random.default_rng(index)
            history: list[Any] = []
            for kind in ("describe", "find", "describe"):
                question = ask(scene, kind, "en", rng)
                if question is None:
                    continue
                query: list[dict[str, Any]] = [*([] if history else [{"image": scene.image}]), {"text": question.text}]
                options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 160}
                found = {name: runtime.answer(query, history, **options) for name, runtime in runtimes.items()}
                if found["plain"].token_ids != found["lookup"].token_ids:
                    raise SystemExit(f"{found['plain'].text!r} without lookup, {found['lookup'].text!r} with it")
                for name, answer in found.items():
                    total[name] += answer.timing.decode_s
                tokens += found["plain"].timing.decoded_tokens
                history.append((query, found["plain"].text))
        if turn:
            for name, seconds in total.items():
                rates[name].append(tokens / seconds)
    return {
        "rounds": rounds,
        "tokens": tokens,
        "tokens_a_step": tokens / steps,
        "tokens_per_s": {n: {"median": statistics.median(v), "low": min(v), "high": max(v)} for n, v in rates.items()},
    }


@exits_with_its_message("benchmarks.lookup")
def main(arguments: list[str] | None = None) -> None:
    parser = model_command("lookup", __doc__, device="cpu", max_context=2048, lookup=7)
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    options = LoadOptions.given(args)
    drafts = {"plain": 0, "lookup": options["lookup"]}
    runtimes = {name: Runtime.from_pretrained(args.path, **options | {"lookup": n}) for name, n in drafts.items()}
    found = measure(runtimes, args.scenes, args.rounds)
    for name, rate in found["tokens_per_s"].items():
        print(f"{name:>6}: {rate['median']:.0f} tokens/s ({rate['low']:.0f} to {rate['high']:.0f})")
    print(f"{found['tokens']} tokens, {found['tokens_a_step']:.2f} per step with lookup; identical answers")
    device = runtimes["plain"].plan.device
    save(args.json, "lookup", device, model=args.path, lookup=options["lookup"], **found)


if __name__ == "__main__":
    main()
