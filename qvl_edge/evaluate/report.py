"""The report of an evaluation: plain values for JSON, a table for the terminal, and an HTML page with images."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from PIL import Image

from qvl_edge import markdown
from qvl_edge.evaluate.grounding import first_box
from qvl_edge.evaluate.intervals import Estimate, difference_of, mean_of
from qvl_edge.evaluate.task import Item, Metric, Prediction, Task
from qvl_edge.text.boxes import parse_boxes
from qvl_edge.text.draw import draw_boxes
from qvl_edge.vision.image import load_image

WORST = 12  # examples shown
THUMBNAIL = 320  # pixels on its longer side


@dataclass(frozen=True)
class Scored:
    """A model's predictions for a task's items, and their scores."""

    about: Mapping[str, Any]  # name, identity, precision, … of the model
    predictions: Mapping[str, Prediction]
    metrics: Sequence[Metric]
    totals: Mapping[str, float]

    @classmethod
    def of(
        cls, task: Task, items: Sequence[Item], predictions: Mapping[str, Prediction], about: Mapping[str, Any]
    ) -> "Scored":
        """Score `predictions`."""
        metrics = task.score(items, predictions)
        return cls(about, predictions, metrics, task.totals(metrics) if task.totals else {})


def rows(model: Scored, against: Scored | None) -> list[dict[str, Any]]:
    """One row per metric and group: n, the mean and its interval, the same for `against`, and the paired difference."""
    found = []
    for index, metric in enumerate(model.metrics):
        other = against.metrics[index] if against else None
        if other is not None and list(other.units) != list(metric.units):
            raise ValueError(f"{metric.name}: the two models were scored on different units")
        groups = list(dict.fromkeys(metric.groups))
        for group in [None, *(groups if len(groups) > 1 else [])]:
            chosen = [at for at in range(len(metric.values)) if group is None or metric.groups[at] == group]
            values = [metric.values[at] for at in chosen]
            weights = [metric.weights[at] for at in chosen] if metric.weights else []
            row: dict[str, Any] = {
                "metric": metric.name,
                "group": group,
                "n": len(values),
                "scale": metric.scale,
                "shown": metric.shown,
                "model": shown(metric, mean_of(values, weights)),
            }
            if other is not None:
                theirs = [other.values[at] for at in chosen]
                difference = difference_of(theirs, values, weights)
                row["against"] = shown(metric, mean_of(theirs, weights))
                row["difference"] = asdict(difference) | {"mean": shown(metric, difference.mean)}
            found.append(row)
    return found


def shown(metric: Metric, estimate: Estimate) -> dict[str, float | None]:
    """The estimate as it is reported; None where it is NaN, which JSON cannot hold."""
    if metric.shown == "perplexity":
        value, low, high = (math.exp(-edge) for edge in (estimate.value, estimate.high, estimate.low))
    else:
        value, low, high = (edge * metric.scale for edge in (estimate.value, estimate.low, estimate.high))
    known = {"value": value, "low": low, "high": high}
    return {name: None if math.isnan(edge) else edge for name, edge in known.items()}


def worst(items: Sequence[Item], model: Scored, against: Scored | None) -> list[str]:
    """Ids of the items to look at first: what `model` loses most against the other one, then its lowest scores."""
    if not model.metrics:
        return []
    metric = model.metrics[0]
    theirs = against.metrics[0].values if against else metric.values
    best = max(1.0, *metric.values)  # 1.0 also where no answer is correct
    order = sorted(
        range(len(metric.values)), key=lambda at: (metric.values[at] - theirs[at], metric.values[at], metric.units[at])
    )
    ids = [one for at in order if metric.values[at] < max(best, theirs[at]) for one in metric.items[at]]
    known = {item.id for item in items}
    return [one for one in dict.fromkeys(ids) if one in known][:WORST]


def to_dict(task: Task, items: Sequence[Item], model: Scored, against: Scored | None, **about: Any) -> dict[str, Any]:
    """The report as plain values: `about` (machine, data, …), the models, rows, totals, and the worst items."""
    return {
        "benchmark": "quality",
        "task": task.name,
        "source": task.source,
        "chat_format": task.chat_format,
        "generation": dict(task.generation),
        **about,
        "items": len(items),
        "model": dict(model.about),
        "against": dict(against.about) if against else None,
        "rows": rows(model, against),
        "totals": {"model": dict(model.totals), "against": dict(against.totals) if against else None},
        "worst": worst(items, model, against),
    }


def figure(estimate: Mapping[str, float | None], form: str = ".2f") -> str:
    """76.30 [71.20, 80.80]; without the interval where there are too few values for one."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return "–"
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _difference(row: Mapping[str, Any]) -> str:
    """+1.20 [-0.30, +2.70]; for perplexities the ratio; = where no item differs and there is no interval either (shares
    of correct answers have one)."""
    difference, mean = row["difference"], row["difference"]["mean"]
    if row["shown"] == "perplexity":
        return "× " + figure(mean, ".4f")
    if not difference["better"] and not difference["worse"] and mean["low"] == mean["high"]:
        return "="
    return figure(mean, "+.2f")


def table(report: Mapping[str, Any], language: str = "en") -> str:
    """The rows as a markdown table: means with 95 % intervals."""
    both, words = report["against"] is not None, WORDS[language]
    head = [words["metric"], "n", report["model"]["name"]]
    if both:
        head += [report["against"]["name"], words["difference"], words["better"], "p"]
    rows = []
    for row in report["rows"]:
        name = row["metric"] if row["group"] is None else f"{row['metric']}, {row['group']}"
        form = ".4f" if row["shown"] == "perplexity" else ".2f"
        cells = [name, str(row["n"]), figure(row["model"], form)]
        if both:
            difference = row["difference"]
            cells += [
                figure(row["against"], form),
                _difference(row),
                f"{difference['better']} / {difference['worse']}",
                "<0.001" if difference["p"] < 0.001 else f"{difference['p']:.3f}",
            ]
        rows.append(cells)
    for name, value in report["totals"]["model"].items():
        cells = [name, "", f"{value:.2f}"]
        if both:
            other = report["totals"]["against"][name]
            cells += [f"{other:.2f}", f"{value - other:+.2f}", "", ""]
        rows.append(cells)
    return markdown.table(head, rows, numbers_from=1)


WORDS = {
    "en": {
        "metric": "metric",
        "difference": "difference",
        "better": "better / worse",
        "worst": "Worst examples",
        "question": "prompt",
        "reference": "expected",
        "about": "Settings",
        "nothing": "No wrong answers.",
        "unscored": "A judge scores these answers; the command printed how.",
        "note": "Brackets are 95 % intervals. The difference is paired: same items, the first model minus the second.",
    },
    "zh": {
        "metric": "指标",
        "difference": "差值",
        "better": "变好 / 变差",
        "worst": "错得最多的例子",
        "question": "问题",
        "reference": "标准答案",
        "about": "评测设置",
        "nothing": "没有答错的题。",
        "unscored": "这些回答由评判模型打分，命令已给出方法。",
        "note": "方括号内是 95% 置信区间。差值是配对的：同样的题目，前一个模型减去后一个模型。",
    },
}
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;display:block;overflow-x:auto}th,td{border:1px solid #ccc;padding:.25rem .6rem}
td+td,th+th{text-align:right;white-space:nowrap}
.item{display:flex;flex-wrap:wrap;gap:1rem;border-top:1px solid #ccc;padding:1rem 0}
.item div{min-width:16rem}.item div+div{flex:1}.item img{display:block;margin-bottom:.4rem}
img{max-width:100%;height:auto}dt{color:#666;font-size:13px}
dd{margin:0 0 .5rem;white-space:pre-wrap;word-break:break-word}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}th,td,.item{border-color:#444}dt{color:#999}}
"""


def page(
    report: Mapping[str, Any], items: Sequence[Item], model: Scored, against: Scored | None, *, language: str = "en"
) -> str:
    """The report as one self-contained HTML file; the worst items with their images and boxes."""
    words = WORDS[language]
    by_id = {item.id: item for item in items}
    title = f"{report['task']}: {report['model']['name']}"
    if against:
        title += f" / {report['against']['name']}"
    about = {
        name: report[name] for name in ("task", "data", "model", "against", "device", "versions", "commit", "date")
    }
    examples = [_example(by_id[one], model, against, words) for one in report["worst"]]
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in about.items() if value)
    return f"""<!doctype html><html lang="{language}"><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>
<h1>{escape(title)}</h1>
{_html_table(table(report, language)) if report["rows"] else ""}
<p>{words["note"]}</p>
<h2>{words["worst"]}</h2>
{"".join(examples) or f"<p>{words['nothing' if report['rows'] else 'unscored']}</p>"}
<h2>{words["about"]}</h2><dl>{facts}</dl></html>
"""


def _html_table(text: str) -> str:
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row(head, 'th')}{''.join(row(cells, 'td') for cells in body)}</table>"


def _example(item: Item, model: Scored, against: Scored | None, words: Mapping[str, str]) -> str:
    said = model.predictions[item.id].text
    pictures = "".join(_picture(load_image(path), said if len(item.images) == 1 else "") for path in item.images)
    reference = item.reference if isinstance(item.reference, str) else json.dumps(item.reference, ensure_ascii=False)
    facts = [(words["question"], item.text), (words["reference"], reference)]
    facts += [(str(one.about["name"]), one.predictions[item.id].text) for one in (model, against) if one]
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts)
    return (
        f'<section class="item"><div>{pictures}</div><div><b>{escape(item.id)}</b><dl>{listed}</dl></div></section>\n'
    )


def _picture(image: Image.Image, text: str) -> str:
    """A thumbnail with the boxes in `text`."""
    image = image.convert("RGB")
    boxes = parse_boxes(text, image_sizes=[image.size])
    if not boxes and (box := first_box(text)) and all(0 <= edge <= 999 for edge in box):  # raw format has no tags
        boxes = parse_boxes("<box>({:.0f},{:.0f}),({:.0f},{:.0f})</box>".format(*box), image_sizes=[image.size])
    drawn = draw_boxes(image, boxes) if boxes else image
    drawn.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    drawn.save(data, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'
