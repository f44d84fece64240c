"""The two tables of Qwen-VL's README on this machine: python -m benchmarks.qwen_tables BUNDLE [--tokens 256]

Speed: 1,792 and 7,934 tokens generated after one image of 258 tokens, here over the whole call, including encoding the
image and prefill. Memory: the peak of a prompt of 1,792 tokens with one image and one new token, and of the longer
generation. `--tokens` shortens all of these; the table then shows the measured lengths, and is not comparable: a
shorter context is faster and needs less memory. GB are 10^9 bytes.
"""

import time

from benchmarks.report import exits_with_its_message, model_command, say
from qvl_edge.bench import Bench, Row
from qvl_edge.commands.bench import parameters_text
from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.errors import ConfigError
from qvl_edge.files import write_json
from qvl_edge.machine import describe_machine
from qvl_edge.markdown import table
from qvl_edge.options import LoadOptions

IMAGE = IMAGE_TOKENS + 2  # with <img> and </img>
ENCODED = 1792  # tokens of the prompt whose memory is measured (README: "2048-258")
GENERATED = {2048: 1792, 8192: 7934}  # tokens, by the column of the table
SPEEDS = tuple(f"Speed ({total} tokens)" for total in GENERATED)
MEMORIES = ("Peak Usage for Encoding 2048 Tokens", "Peak Usage for Generating 8192 Tokens")
# QwenLM/Qwen-VL, README.md, "Inference Speed" and "GPU Memory Usage": A100-SXM4-80G, PyTorch 2.0.1, CUDA 11.4
PUBLISHED: dict[str, tuple[float, ...]] = {
    "BF16, published": (28.87, 24.32, 22.60, 28.01),
    "Int4, published": (37.79, 34.34, 11.82, 17.23),
}
PUBLISHED_PARAMETERS, PUBLISHED_ON = "9.66 B", "A100-SXM4-80G"
COUNTED = "host: this process; torch: allocated by torch; card: used by any program, as reported by the driver."


def measure(bench: Bench, *, tokens: int | None = None) -> dict[str, Row]:
    """One run per column, after a warm-up: column -> tokens asked for and measured, and the figures."""
    room = bench.runtime.max_context
    if room <= IMAGE:
        raise ConfigError(f"max_context is {room}, an image and one token take {IMAGE + 1}; raise --max-context")
    most = room if tokens is None else tokens
    _run(bench, IMAGE, min(8, room - IMAGE))
    found: dict[str, Row] = {}
    length = min(ENCODED, max(IMAGE, most), room - 1)
    found[MEMORIES[0]] = {"asked": ENCODED, "measured": length, **_run(bench, length, 1)}
    for column, count in zip(SPEEDS, GENERATED.values(), strict=True):
        measured = min(count, most, room - IMAGE)
        found[column] = {"asked": count, "measured": measured, **_run(bench, IMAGE, measured)}
    return found | {MEMORIES[1]: found[SPEEDS[1]]}


def _run(bench: Bench, length: int, count: int) -> Row:
    """A prompt of `length` tokens with a new image, and `count` generated tokens."""
    say(f"{length} tokens in, {count} out")
    ids, starts, images = bench.turn(1, length - IMAGE)
    bench.reset_peaks()
    start = time.perf_counter()
    bench.generate(ids, count, starts, images)
    return {"tokens_per_s": count / (time.perf_counter() - start), "peak_bytes": bench.peaks()}


def tables(found: dict[str, Row], about: Row, device: str) -> str:
    """Both tables as markdown, ours below the published figures."""

    def markdown(columns: tuple[str, ...], published: slice, unit: str, ours: dict[str, list[str]]) -> str:
        rows = [
            [name, PUBLISHED_PARAMETERS, PUBLISHED_ON, *(f"{value:.2f}{unit}" for value in values[published])]
            for name, values in PUBLISHED.items()
        ]
        rows += [[name, parameters_text(about["params"]), device, *cells] for name, cells in ours.items()]
        return table(["", "parameters", "on", *columns], rows)

    speeds = [f"{found[column]['tokens_per_s']:.2f}" + _cut(found[column]) for column in SPEEDS]
    peaks = {
        f"{about['model']}, {kind.removeprefix('peak ')}": [
            f"{found[column]['peak_bytes'][kind] / 1e9:.2f} GB" + _cut(found[column]) for column in MEMORIES
        ]
        for kind in found[MEMORIES[0]]["peak_bytes"]
    }
    speed = markdown(SPEEDS, slice(2), "", {about["model"]: speeds})
    memory = markdown(MEMORIES, slice(2, 4), " GB", peaks)
    return f"{speed}\n\n{memory}\n\n{COUNTED}"


def _cut(run: Row) -> str:
    return "" if run["measured"] == run["asked"] else f" (only {run['measured']} of {run['asked']} tokens)"


@exits_with_its_message("benchmarks.qwen_tables")
def main(arguments: list[str] | None = None) -> None:
    parser = model_command("qwen_tables", __doc__, save="--output")
    parser.add_argument("--tokens", type=int, metavar="N", help="generate at most N tokens")
    args = parser.parse_args(arguments)
    if args.tokens is not None and args.tokens < 2:
        parser.error("--tokens has to be 2 or more")
    options = LoadOptions.given(args)
    bench = Bench(args.path, options)
    found = measure(bench, tokens=args.tokens)
    about, machine = bench.about(), describe_machine(str(bench.device))
    print(tables(found, about, machine["device"]))
    if args.output:
        write_json(args.output, {"benchmark": "qwen_tables", **machine, **about, "options": options, "runs": found})


if __name__ == "__main__":
    main()
