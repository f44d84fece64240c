"""What guessing from earlier text brings: the same greedy answers with and without prompt lookup.

    python -m benchmarks.lookup PATH [--lookup 7] [--scenes 20] [--json FILE]

Descriptions and repeated questions about synthetic scenes; each answer is made both ways, in turn, and has to have the
same tokens. What it brings depends on how much answers repeat, and on what a step of several tokens costs there.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from qvl_edge import Runtime
from qvl_edge.demo.scenes import UNSEEN, ask, make_scene
from qvl_edge.machine import describe_machine, ends_with_its_message


def measure(path: str, device: str, lookup: int, scenes: int, rounds: int) -> dict[str, Any]:
    """Seconds and tokens of both ways; SystemExit if a token differs."""
    ways = {"plain": 0, "lookup": lookup}
    runtimes = {
        name: Runtime.from_pretrained(path, device=device, max_context=2048, lookup=count)
        for name, count in ways.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens, steps = 0, 0
    real = runtimes["lookup"].slots.advance

    def counted() -> Any:
        nonlocal steps
        steps += 1
        return real()

    runtimes["lookup"].slots.advance = counted  # type: ignore[method-assign]
    for turn in range(rounds + 1):  # the first does not count
        total = dict.fromkeys(ways, 0.0)
        tokens = steps = 0
        for index in range(scenes):
            scene, rng = make_scene(UNSEEN + index), np.random.default_rng(index)
            history: list[Any] = []
            for kind in ("describe", "find", "describe"):
                question = ask(scene, kind, "en", rng)
                if question is None:
                    continue
                query = [*([] if history else [{"image": scene.image}]), {"text": question.text}]
                found = {
                    name: runtime.answer(query, history, do_sample=False, max_new_tokens=160)
                    for name, runtime in runtimes.items()
                }
                if found["plain"].token_ids != found["lookup"].token_ids:
                    raise SystemExit(f"{found['plain'].text!r} without lookup, {found['lookup'].text!r} with it")
                for name, answer in found.items():
                    total[name] += answer.timing.decode_s
                tokens += found["plain"].timing.decoded_tokens
                history.append((query, found["plain"].text))
        if turn:
            for name in ways:
                seconds[name].append(total[name])
    rates = {name: [tokens / one for one in values] for name, values in seconds.items()}
    return {
        "lookup": lookup,
        "rounds": rounds,
        "tokens": tokens,
        "tokens_a_step": tokens / steps,
        "tokens_per_s": {n: {"median": statistics.median(v), "low": min(v), "high": max(v)} for n, v in rates.items()},
    }


@ends_with_its_message("benchmarks.lookup")
def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lookup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="a bundle or checkpoint of the small model")
    parser.add_argument("--lookup", type=int, default=7)
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="save the figures, with machine, versions, commit and date")
    args = parser.parse_args(arguments)
    found = measure(args.path, args.device, args.lookup, args.scenes, args.rounds)
    for name, rate in found["tokens_per_s"].items():
        print(f"{name:>6}: {rate['median']:.0f} tokens/s ({rate['low']:.0f} to {rate['high']:.0f})")
    print(f"{found['tokens']} tokens, {found['tokens_a_step']:.2f} a step with lookup; all answers the same")
    if args.json:
        device = "cuda" if args.device.startswith("cuda") else "cpu"
        args.json.write_text(
            json.dumps({"benchmark": "lookup", "model": args.path, **describe_machine(device), **found}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
