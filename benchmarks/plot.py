"""Draw the chart of a saved result: python -m benchmarks.plot RESULT.json [OUT.svg]

For results of benchmarks.latency, gpu and compression, and for the log.jsonl of benchmarks.small_model.train.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import command, exits_with_its_message
from qvl_edge import plot
from qvl_edge.commands import bench
from qvl_edge.errors import QvlError
from qvl_edge.files import read_json, read_jsonl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = Mapping[str, Any]


def gpu(result: Result) -> "Figure | None":
    """Up to four panels, of the data that `result` has; None if it has none.

    Bandwidth of a layer's GEMMs, int4_gemm's speed beside its peers by rows of x, the roofline, and decode steps.
    """
    records = sorted(result.get("int4_gemm", []), key=lambda record: record["rows"])
    shape = [result["int4_gemm"][0][name] for name in ("in_features", "out_features")] if records else []
    first = [record for record in records if [record["in_features"], record["out_features"]] == shape]
    steps = [record for record in result.get("decode_step", []) if "tokens_per_s" in record and record["batch"] == 1]
    every: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
        (_layer, (result.get("layer"),)),
        (_peers, (first,)),
        (_roofline, (first, records, result.get("copy_gb_per_s"))),
        (_steps, (steps,)),
    ]
    drawn = [(draw, data) for draw, data in every if all(data)]
    if not drawn:
        return None
    figure, axes = plot.panels(len(drawn), width=6)
    for (draw, data), panel in zip(drawn, axes, strict=True):
        draw(panel, *data)
    return figure


def _layer(axes: "Axes", layers: Sequence[Result]) -> None:
    names = list(layers[0]["projections"])
    share = "share_of_copy" in layers[0]["projections"][names[0]]
    key = "share_of_copy" if share else "gb_per_s"
    series = {
        f"{layer['rows']} rows: {layer['layer_us']:.1f} us per layer": [layer["projections"][n][key] for n in names]
        for layer in layers
    }
    axes.set(title="Products of a layer, as launched", ylabel="share of a copy's bandwidth" if share else "GB/s")
    plot.bars(axes, names, series)
    if share:
        axes.set_ylim(0, 1)


def _names(records: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record["peers"]))


def _peers(axes: "Axes", records: Sequence[Result]) -> None:
    names, peers = _names(records), [record["peers"] for record in records]
    series = {name: [one[name]["speed"] if name in one else None for one in peers] for name in names}
    shape = f"{records[0]['in_features']} x {records[0]['out_features']}"
    axes.set(title=f"{shape}, by rows of x", ylabel=f"speed relative to {names[0]}")
    plot.bars(axes, [str(record["rows"]) for record in records], series)


def _roofline(axes: "Axes", records: Sequence[Result], every: Sequence[Result], copy_gb_per_s: float) -> None:
    """TFLOP/s by FLOP per byte; the roof is measured: a copy's bandwidth, and the fastest GEMM of all peers."""
    k, n = records[0]["in_features"], records[0]["out_features"]
    peak = max(peer["tflop_per_s"] for record in every for peer in record["peers"].values())
    intensities = []
    for name in _names(records):
        points = []
        for record in records:
            if peer := record["peers"].get(name):
                read = peer["gb_per_s"] * peer["median_ms"] * 1e6 + 2 * record["rows"] * (k + n)
                points.append((2 * record["rows"] * k * n / read, peer["tflop_per_s"]))
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
        intensities += [intensity for intensity, _ in points]
    ridge = peak * 1e3 / copy_gb_per_s
    edges = sorted({min(intensities), max(intensities), ridge})
    roof = [min(peak, x * copy_gb_per_s / 1e3) for x in edges]
    axes.plot(edges, roof, color="#555", linestyle="--", label="roof, as measured")
    axes.set(
        title=f"{k} x {n} under the roofline", xlabel="FLOP per byte", ylabel="TFLOP/s", xscale="log", yscale="log"
    )
    axes.legend(frameon=False, fontsize=9)


def _steps(axes: "Axes", records: Sequence[Result]) -> None:
    def kind(record: Result) -> str:
        return f"{record['head']} head, {record['cache']} cache, {'graph' if record['graph'] else 'eager'}"

    contexts = sorted({record["context"] for record in records})
    rates = {(kind(record), record["context"]): record["tokens_per_s"] for record in records}
    series = {name: [rates.get((name, context)) for context in contexts] for name, _ in rates}
    axes.set(title="Whole decode steps, one sequence", ylabel="tokens per second")
    plot.bars(axes, [f"context {context}" for context in contexts], series)


def compression(result: Result) -> "Figure":
    """Difference in right answers, and divergence, of every variant with 95 % intervals."""
    rows = [row for row in result["variants"] if row["variant"] != "float32"][::-1]  # the first one on top
    rights = [
        next(row for row in entry["rows"] if (row["metric"], row["group"]) == ("right", None))["difference"]["mean"]
        for entry in rows
    ]
    figure, (left, right) = plot.panels(2, width=5.5, height=1.2 + 0.28 * len(rows))
    for axes, estimates in ((left, rights), (right, [entry["kl"] for entry in rows])):
        values = [estimate["value"] for estimate in estimates]
        errors = [[e["value"] - e["low"] for e in estimates], [e["high"] - e["value"] for e in estimates]]
        axes.errorbar(values, range(len(rows)), xerr=errors, fmt="o")
        axes.set_yticks(range(len(rows)), [entry["variant"] for entry in rows])
    left.axvline(0, color="#888", linewidth=1)
    left.set_title("Right answers, difference from float32 in points", fontsize=11)
    right.set_title("Divergence from float32, nats per token", fontsize=11)
    right.set_xscale("log")
    right.set_xlim(left=min(entry["kl"]["value"] for entry in rows) / 3)
    right.tick_params(labelleft=False)
    return figure


def loss(log: Path) -> "Figure":
    """The losses of both stages of a training log."""
    rows = [row for _, row in read_jsonl(log)]
    figure, panels = plot.panels(2, width=5, height=4)
    for axes, stage, names in zip(panels, ("vision", "joint"), (("cells",), ("answers", "two", "cells")), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row["stage"] == stage and name in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=name)
                axes.legend(frameon=False)
        axes.set(title=f"stage: {stage}", xlabel="step", ylabel="loss", yscale="log")
    return figure


def draw(result: Result, path: Path) -> bool:
    """Draw a result into `path`; False if it is empty. QvlError if the benchmark has no chart."""
    footnote = plot.measured_on(result)
    match result["benchmark"]:
        case "latency":
            figure: Figure | None = bench.chart(result["records"])
        case "gpu":
            figure = gpu(result)
            footnote += f"; a copy reaches {result['copy_gb_per_s']:.0f} GB/s" if "copy_gb_per_s" in result else ""
        case "compression":
            figure = compression(result)
            counted = f"{result['scenes']} scenes, {result['questions']} questions"
            footnote = f"{counted}; {footnote}. Bars are 95 % intervals."
        case other:
            raise QvlError(f"results of {other} have no chart")
    if figure is not None:
        plot.save(figure, path, footnote)
    return figure is not None


@exits_with_its_message("benchmarks.plot")
def main(arguments: list[str] | None = None) -> None:
    parser = command("plot", __doc__)
    parser.add_argument("result", type=Path, metavar="RESULT", help="a saved result (.json) or training log (.jsonl)")
    parser.add_argument("out", type=Path, nargs="?", help=".svg or .png (default: beside RESULT)")
    args = parser.parse_args(arguments)
    if args.result.suffix == ".jsonl":
        plot.save(loss(args.result), args.out or args.result.with_suffix(".png"))
    elif not draw(read_json(args.result), args.out or args.result.with_suffix(".svg")):
        raise SystemExit(f"{args.result} holds nothing to draw")


if __name__ == "__main__":
    main()
