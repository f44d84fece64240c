"""Charts of measured results. Needs matplotlib: pip install 'qvl-edge[plot]'."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_edge.errors import QvlError
from qvl_edge.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#66a182", "#7d5ba6", "#8d99ae")
MAX_COLUMNS = 3
MAX_LABELLED_BARS = 12  # of a panel; more values would overlap


class MissingMatplotlib(QvlError):
    """A chart was asked for, and matplotlib is not installed."""


@contextlib.contextmanager
def optional() -> Iterator[None]:
    """Without matplotlib, skip the chart with a message on stderr: for commands that have saved their result."""
    try:
        yield
    except MissingMatplotlib as error:
        print(f"no chart: {error}", file=sys.stderr)


def panels(count: int, *, width: float = 4.5, height: float = 3.8) -> "tuple[Figure, list[Axes]]":
    """A figure of `count` panels, width x height inches each."""
    try:
        from cycler import cycler
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingMatplotlib(f"charts need matplotlib ({error}); pip install 'qvl-edge[plot]'") from None
    columns = count if count <= MAX_COLUMNS else -(-count // 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes: list[Axes] = [figure.add_subplot(rows, columns, 1 + index) for index in range(count)]
    for panel in axes:
        panel.set_prop_cycle(cycler(color=COLOURS))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e4e4e4")
        panel.set_axisbelow(True)
    return figure, axes


def bars(axes: "Axes", groups: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> None:
    """Grouped bars with their values on top; None leaves a gap. The legend is below the panel."""
    width = 0.8 / max(1, len(series))
    labelled = len(groups) * len(series) <= MAX_LABELLED_BARS
    for index, (name, values) in enumerate(series.items()):
        shown = [(group, value) for group, value in enumerate(values) if value is not None]
        places = [group + (index - (len(series) - 1) / 2) * width for group, _ in shown]
        drawn = axes.bar(places, [value for _, value in shown], width * 0.92, label=name)
        if labelled:
            axes.bar_label(drawn, [short(value) for _, value in shown], fontsize=8, padding=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.1)  # room for the values
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False, fontsize=9)


def short(value: float) -> str:
    """Three digits: 0.25, 683, 14.5k."""
    return f"{value / 1000:.3g}k" if value >= 10_000 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def measured_on(result: Mapping[str, Any]) -> str:
    """The footnote of a result's chart: device, threads, versions, date and commit."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    return f"{result['device']}, {threads}, {versions}, {result['date']}, commit {result['commit']}"


def save(figure: "Figure", path: Path, footnote: str = "") -> None:
    """Write `figure` to `path`, .svg or .png."""
    import matplotlib

    if footnote:
        figure.supxlabel(footnote, x=0.01, ha="left", fontsize=8)
    form = path.suffix.removeprefix(".")
    # text stays text, and files are reproducible
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qvl_edge"}), replacing(path) as partial:
        figure.savefig(partial, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
