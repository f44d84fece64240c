"""Tables in Markdown."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, numbers_from: int | None = None) -> str:
    """A table without padding; columns from `numbers_from` on are aligned to the right."""
    left = len(head) if numbers_from is None else numbers_from
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
