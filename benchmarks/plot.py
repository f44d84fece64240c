"""The picture of a benchmarks.gpu result, as SVG: python -m benchmarks.plot DIR/gpu.json OUT.svg

Four panels: the share of the memory's bandwidth that each product of a layer reaches, int4_gemm's speed beside its
peers over the rows of x, where that stands under the roof of memory and tensor cores, and whole decoding steps. Written
by hand, so that drawing needs nothing to be installed.
"""

import argparse
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, MARGIN = 420, 300, 60
COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#66a182", "#7d5ba6", "#8d99ae")


def text(x: float, y: float, said: str, *, size: int = 11, anchor: str = "middle", turn: int = 0) -> str:
    """One label."""
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{turned}>{escape(said)}</text>'


def figure(value: float) -> str:
    """Three digits that fit beside an axis: 0.25, 683, 14.5k."""
    return f"{value / 1000:.3g}k" if value >= 10_000 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


class Panel:
    """A framed area of the picture with a title and a vertical axis from 0 to `top`, with marks unless told not to."""

    def __init__(self, index: int, title: str, unit: str, top: float, *, ticks: bool = True):
        step = 10.0 ** math.floor(math.log10(top / 5))
        top = (
            5
            * step
            * next(round_ for round_ in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if 5 * step * round_ >= top * 0.999)
        )
        self.left, self.top = MARGIN + index * (WIDTH + MARGIN), top
        self.parts = [
            text(self.left + WIDTH / 2, 24, title, size=14),
            f'<rect x="{self.left}" y="40" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>',
            text(self.left - 44, 40 + HEIGHT / 2, unit, turn=-90),
        ]
        for fifth in range(6 if ticks else 0):
            y = self.y(top * fifth / 5)
            self.parts.append(f'<path d="M{self.left} {y:.1f}h{WIDTH}" stroke="#eee"/>')
            self.parts.append(text(self.left - 6, y + 4, figure(top * fifth / 5), anchor="end"))

    def y(self, value: float) -> float:
        """Where a value stands."""
        return 40 + HEIGHT * (1 - min(value, self.top) / self.top)

    def bars(self, groups: Sequence[str], series: dict[str, list[float | None]]) -> None:
        """One bar a group and series, with its value on top; None is left empty."""
        wide = WIDTH / max(1, len(groups))
        each = wide * 0.8 / max(1, len(series))
        for g, group in enumerate(groups):
            self.parts.append(text(self.left + (g + 0.5) * wide, 40 + HEIGHT + 16, group))
            for s, values in enumerate(series.values()):
                value = values[g]
                if value is None:
                    continue
                x, y = self.left + g * wide + wide * 0.1 + s * each, self.y(value)
                box = f'x="{x:.1f}" y="{y:.1f}" width="{each * 0.92:.1f}" height="{40 + HEIGHT - y:.1f}"'
                self.parts.append(f'<rect {box} fill="{COLOURS[s % len(COLOURS)]}"/>')
                if len(groups) * len(series) <= 24:
                    self.parts.append(text(x + each / 2, y - 3, figure(value), size=9))
        self.legend(list(series))

    def legend(self, names: list[str]) -> None:
        """Which colour is what."""
        for s, name in enumerate(names):
            x, y = self.left + (s % 2) * WIDTH / 2, 40 + HEIGHT + 34 + 16 * (s // 2)
            self.parts.append(f'<rect x="{x:.1f}" y="{y - 9}" width="10" height="10" fill="{COLOURS[s % 6]}"/>')
            self.parts.append(text(x + 14, y, name, anchor="start"))


def layer_panel(index: int, result: dict[str, Any]) -> Panel | None:
    """Share of the copy's bandwidth (of GB/s where none was measured) of each projection."""
    layers = result.get("layer", [])
    if not layers:
        return None
    key = "share_of_copy" if "share_of_copy" in next(iter(layers[0]["projections"].values())) else "gb_per_s"
    names = list(layers[0]["projections"])
    series = {
        f"{layer['rows']} rows: {layer['layer_us']:.1f} us a layer": [layer["projections"][n][key] for n in names]
        for layer in layers
    }
    top = 1.0 if key == "share_of_copy" else max(max(values) for values in series.values()) * 1.1
    panel = Panel(index, "Products of a layer, as launched", "of the copy's bandwidth" if top == 1 else "GB/s", top)
    panel.bars(names, dict(series))
    return panel


def peers_panel(index: int, result: dict[str, Any]) -> Panel | None:
    """Speed relative to the same product without int4, over the rows, at the first shape."""
    records = result.get("int4_gemm", [])
    if not records:
        return None
    shape = (records[0]["in_features"], records[0]["out_features"])
    mine = sorted((r for r in records if (r["in_features"], r["out_features"]) == shape), key=lambda r: int(r["rows"]))
    names = list(dict.fromkeys(name for record in mine for name in record["peers"]))
    series: dict[str, list[float | None]] = {
        name: [record["peers"][name]["speed"] if name in record["peers"] else None for record in mine] for name in names
    }
    top = max(value for values in series.values() for value in values if value is not None) * 1.1
    panel = Panel(index, f"{shape[0]} x {shape[1]}, by rows of x", f"times as fast as {names[0]}", top)
    panel.bars([str(record["rows"]) for record in mine], series)
    return panel


def roofline_panel(index: int, result: dict[str, Any]) -> Panel | None:
    """TFLOP/s over operations a byte of weight and rows, both in powers of ten, at the first shape.

    The roof is what was measured on the device: a copy's bandwidth, and the fastest product of all peers.
    """
    records, rate = result.get("int4_gemm", []), result.get("copy_gb_per_s")
    if not records or not rate:
        return None
    k, n = records[0]["in_features"], records[0]["out_features"]
    mine = sorted((r for r in records if (r["in_features"], r["out_features"]) == (k, n)), key=lambda r: int(r["rows"]))
    peak = max(peer["tflop_per_s"] for record in records for peer in record["peers"].values())
    names = list(dict.fromkeys(name for record in mine for name in record["peers"]))
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for record in mine:
        for name, peer in record["peers"].items():
            read = peer["gb_per_s"] * peer["median_ms"] * 1e6 + 2 * record["rows"] * (k + n)
            points[name].append((2 * record["rows"] * k * n / read, peer["tflop_per_s"]))
    every = [point for line in points.values() for point in line]
    left, right = (edge(math.log10(x)) for edge, x in ((math.floor, min(every)[0]), (math.ceil, max(every)[0])))
    low = math.floor(math.log10(min(y for _, y in every)))
    high = math.ceil(math.log10(peak * 1.05))
    panel = Panel(index, f"{k} x {n} under the roof", "TFLOP/s", 1.0, ticks=False)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - left) / (right - left)
        return panel.left + WIDTH * across, panel.y(max(0.0, (math.log10(y) - low) / (high - low)))

    for power in range(low, high + 1):
        x, y = place(10**left, 10**power)
        panel.parts.append(text(x - 6, y + 4, f"{10.0**power:g}", anchor="end"))
    for power in range(left, right + 1):
        x, y = place(10**power, 10**low)
        panel.parts.append(text(x, y + 16, f"{10.0**power:g} FLOP/B"))
    ridge = min(max(peak * 1e3 / rate, 10**left), 10**right)
    roof = [place(10**left, 10**left * rate / 1e3), place(ridge, min(peak, ridge * rate / 1e3)), place(10**right, peak)]
    panel.parts.append(_line(roof, "#555", 'stroke-dasharray="5 3"'))
    for s, line in enumerate(points.values()):
        panel.parts.append(_line([place(*point) for point in line], COLOURS[s % len(COLOURS)]))
    panel.legend(names)
    return panel


def _line(points: list[tuple[float, float]], colour: str, style: str = "") -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" {style}/>'


def steps_panel(index: int, result: dict[str, Any]) -> Panel | None:
    """Tokens a second of whole steps at batch 1."""
    records = [r for r in result.get("decode_step", []) if "tokens_per_s" in r and r["batch"] == 1]
    if not records:
        return None
    contexts = sorted({record["context"] for record in records})
    kinds = list(dict.fromkeys(_kind(record) for record in records))
    series: dict[str, list[float | None]] = {
        kind: [
            next((r["tokens_per_s"] for r in records if (_kind(r), r["context"]) == (kind, context)), None)
            for context in contexts
        ]
        for kind in kinds
    }
    top = max(value for values in series.values() for value in values if value is not None) * 1.1
    panel = Panel(index, "Whole decoding steps, one sequence", "tokens a second", top)
    panel.bars([f"context {context}" for context in contexts], series)
    return panel


def _kind(record: dict[str, Any]) -> str:
    return f"{record['head']} head, {record['cache']} cache, {'graph' if record['graph'] else 'eager'}"


def picture(result: dict[str, Any]) -> str | None:
    """SVG of what the result holds; None if there is nothing to draw."""
    panels: list[Panel] = []
    for make in (layer_panel, peers_panel, roofline_panel, steps_panel):
        panel = make(len(panels), result)
        if panel:
            panels.append(panel)
    if not panels:
        return None
    copy = f"a copy reaches {result['copy_gb_per_s']:.0f} GB/s" if "copy_gb_per_s" in result else ""
    return framed(panels, result, copy)


def framed(panels: Sequence[Panel], result: dict[str, Any], note: str = "") -> str:
    """The SVG of panels side by side, with a line below that says what a result was measured on."""
    width, height = MARGIN + len(panels) * (WIDTH + MARGIN), HEIGHT + 160
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    about = f"{result['device']}, {versions}, {result['date']}, commit {result['commit']}{'; ' if note else ''}{note}"
    parts = [part for panel in panels for part in panel.parts]
    parts.append(text(MARGIN, height - 12, about, size=10, anchor="start"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Parse, draw, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(arguments)
    drawing = picture(json.loads(args.result.read_text()))
    if drawing is None:
        raise SystemExit(f"{args.result} holds nothing to draw")
    args.out.write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
