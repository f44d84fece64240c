"""Prompt lookup decoding: the tokens that followed the same n-gram earlier are the draft of what comes next.

Answers repeat their prompt and themselves (labels, coordinates, printed text), so such a draft is often right, and it
costs nothing. Source: Saxena, "Prompt Lookup Decoding" (2023).
"""

from collections.abc import Sequence

from qvl_edge.engine.request import Element

MAX_NGRAM, MIN_NGRAM = 4, 2  # tokens that have to match; a single one is too often a comma
WINDOW = 4096  # elements searched, from the end


def propose(elements: Sequence[Element], most: int) -> list[int]:
    """Up to `most` tokens that followed the latest earlier occurrence of the last 4, 3 or 2 elements; [] if none did.

    Stops before a picture's slots.
    """
    tail = list(elements[-WINDOW:])
    for size in range(min(MAX_NGRAM, len(tail) - 1), MIN_NGRAM - 1, -1):
        wanted = tail[-size:]
        for start in range(len(tail) - size - 1, -1, -1):
            if tail[start] == wanted[0] and tail[start : start + size] == wanted:
                found: list[int] = []
                for element in tail[start + size : start + size + most]:
                    if isinstance(element, str):
                        break
                    found.append(element)
                if found:
                    return found
    return []
