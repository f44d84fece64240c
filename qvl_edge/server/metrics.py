"""Counters and histograms in Prometheus' text format (version 0.0.4). Used from the event loop only."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence

from qvl_edge.answer import Answer

FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
WHOLE_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """How many observations were at most each bound."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count `value`."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> list[str]:
        """Cumulative buckets, sum and count."""
        seen, lines = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            seen += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {seen}')
        return [*lines, f"{name}_sum {self.total}", f"{name}_count {seen}"]


class Metrics:
    """The server's counters; they hold no text and no addresses."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = (
            Counter()
        )  # by route and status; 499: the client closed the connection
        self.requests_by_key: Counter[tuple[str, int]] = Counter()
        self.tokens_by_key: Counter[tuple[str, str]] = Counter()  # by key and kind
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = self.images = self.cached_images = 0
        self.first_token_s, self.request_s = Histogram(FIRST_TOKEN_S), Histogram(WHOLE_S)

    def answered(self, answers: Sequence[Answer], seconds: float, key: str | None = None) -> None:
        """Count a request, whose answers share one prompt."""
        usage = answers[0].usage
        self.request_s.observe(seconds)
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += sum(answer.usage.completion_tokens for answer in answers)
        if key is not None:
            self.tokens_by_key[key, "prompt"] += usage.prompt_tokens
            self.tokens_by_key[key, "completion"] += sum(answer.usage.completion_tokens for answer in answers)
        self.images += usage.images
        self.cached_images += usage.cached_images

    def render(self, *, waiting: int, running: int, memory: Mapping[str, tuple[str, int]]) -> str:
        """The text of /metrics. memory: what each gauge counts, and its bytes."""
        lines = [
            "# HELP qvl_edge_requests_total Requests by route and status.",
            "# TYPE qvl_edge_requests_total counter",
        ]
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'qvl_edge_requests_total{{route="{route}",status="{status}"}} {count}')
        for family, what, second, counts in (
            ("requests_by_key", "Requests by API key and status.", "status", self.requests_by_key),
            ("tokens_by_key", "Tokens of answered requests by API key.", "kind", self.tokens_by_key),
        ):
            if counts:
                lines += [f"# HELP qvl_edge_{family}_total {what}", f"# TYPE qvl_edge_{family}_total counter"]
            for (key, label), count in sorted(counts.items()):
                lines.append(f'qvl_edge_{family}_total{{key="{key}",{second}="{label}"}} {count}')
        for name, (what, value) in memory.items():
            lines += [f"# HELP {name} {what}", f"# TYPE {name} gauge", f"{name} {value}"]
        for name, kind, value, what in (
            ("requests_waiting", "gauge", waiting, "Requests that have no slot yet."),
            ("requests_running", "gauge", running, "Requests that are being answered."),
            ("prompt_tokens_total", "counter", self.prompt_tokens, "Tokens of prompts, images included."),
            (
                "cached_tokens_total",
                "counter",
                self.cached_tokens,
                "Tokens of prompts that were in the KV cache already.",
            ),
            ("completion_tokens_total", "counter", self.completion_tokens, "Tokens of answers."),
            ("images_total", "counter", self.images, "Images in prompts."),
            ("cached_images_total", "counter", self.cached_images, "Images whose features were cached."),
        ):
            lines += [f"# HELP qvl_edge_{name} {what}", f"# TYPE qvl_edge_{name} {kind}", f"qvl_edge_{name} {value}"]
        for name, histogram, what in (
            ("time_to_first_token_seconds", self.first_token_s, "From the complete request to the first text."),
            ("request_seconds", self.request_s, "From the complete request to the complete answer."),
        ):
            lines += [f"# HELP qvl_edge_{name} {what}", f"# TYPE qvl_edge_{name} histogram"]
            lines += histogram.lines(f"qvl_edge_{name}")
        return "\n".join(lines) + "\n"
