"""Prompt lookup: what followed the last time that these tokens stood here is a guess at what comes next.

Answers repeat their prompt and themselves (labels, coordinates, printed text), so an n-gram that has occurred is a free
draft. Source of the idea: Saxena, "Prompt Lookup Decoding" (2023).
"""

from collections.abc import Sequence

from qvl_edge.engine.request import Element

LONGEST, SHORTEST = 4, 2  # tokens that have to match; one alone is too often a comma
LOOKED_AT = 4096  # elements from the end that are searched


def propose(elements: Sequence[Element], most: int) -> list[int]:
    """Up to `most` tokens that followed the latest earlier occurrence of the last 4, 3 or 2 elements; [] if none did.

    Stops before a picture's slots.
    """
    tail = list(elements[-LOOKED_AT:])
    for size in range(min(LONGEST, len(tail) - 1), SHORTEST - 1, -1):
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
