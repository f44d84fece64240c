"""JSON schemas with closed objects, so that a model stops when it has said what was asked for.

JSON Schema lets an object have any property that it does not forbid, and a model that may go on often does. As OpenAI's
strict mode and vLLM's backends, `closed` allows only the properties that a schema names, unless it says otherwise.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

SAYS_OTHERWISE = ("additionalProperties", "patternProperties", "unevaluatedProperties")
MAPS = ("properties", "patternProperties", "$defs", "definitions")  # name -> schema of another value
VALUES = ("items", "prefixItems", "additionalItems", "contains", "additionalProperties", "unevaluatedProperties")
UNIONS = ("anyOf", "oneOf")
PARTS = ("allOf", "then", "else")  # about the same value: they are open, and the schema around them is closed


def closed(schema: Schema) -> Schema:
    """`schema` with `additionalProperties: false` wherever an object names its properties."""
    return _Closing(schema).close(schema)


class _Closing:
    """One schema. composed: the definitions that others build on, which must stay open."""

    def __init__(self, root: Schema):
        self.root = root
        self.composed = {part["$ref"] for part in _compositions(root) if isinstance(part.get("$ref"), str)}

    def close(self, node: Any, *, whole: bool = True, path: str = "#") -> Any:
        """`node`, which describes a whole value, or a part of what another schema says about one."""
        if isinstance(node, list):
            return [self.close(item, whole=whole, path=path) for item in node]
        if not isinstance(node, Mapping):
            return node
        whole = whole and path not in self.composed
        made: dict[str, Any] = {}
        for key, value in node.items():
            at = f"{path}/{key}"
            if key in MAPS and isinstance(value, Mapping):
                made[key] = {name: self.close(item, path=f"{at}/{name}") for name, item in value.items()}
            elif key in VALUES:
                made[key] = self.close(value, path=at)
            elif key in UNIONS:  # each is the whole value, if nothing beside them names properties
                made[key] = self.close(value, whole=whole and not _builds(node), path=at)
            elif key in PARTS:
                made[key] = self.close(value, whole=False, path=at)
            else:
                made[key] = value
        if whole and _builds(node):
            # its own patterns stay allowed beside `additionalProperties`; those of a part would not
            names = self.names({key: value for key, value in node.items() if key != "patternProperties"})
            if names or (names is not None and "patternProperties" in node):
                made["properties"] = {**dict.fromkeys(names, True), **made.get("properties", {})}
                made["additionalProperties"] = False
        return made

    def names(self, node: Any) -> list[str] | None:
        """All properties that `node` and its parts name, its own first; None if one says what else there may be."""
        found: dict[str, None] = {}
        followed = set[str]()  # each reference once: they may form circles, and chains as long as a schema
        parts = deque([node])
        while parts:
            part = parts.popleft()
            if not isinstance(part, Mapping):
                continue
            if any(key in part for key in SAYS_OTHERWISE):
                return None
            named = part.get("properties")
            found |= dict.fromkeys(named if isinstance(named, Mapping) else ())
            ref = part.get("$ref")
            if isinstance(ref, str) and ref not in followed:
                followed.add(ref)
                parts.append(self.target(ref))
            for key in (*PARTS, *UNIONS, "if"):
                value = part.get(key, [])
                parts += value if isinstance(value, list) else [value]
        return list(found)

    def target(self, ref: str) -> Any:
        """What a local reference points to; nothing for any other."""
        node: Any = self.root
        for name in ref.removeprefix("#").split("/")[1:]:
            node = node.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
        return node if ref.startswith("#") else None


def _builds(node: Schema) -> bool:
    """Whether `node` names properties, by itself or by its parts."""
    return any(key in node for key in ("properties", "patternProperties", *PARTS))


def _compositions(node: Any) -> Iterator[Schema]:
    """The parts, anywhere in a schema, that are about the same value as the schema around them."""
    if isinstance(node, list):
        for item in node:
            yield from _compositions(item)
    elif isinstance(node, Mapping):
        if _builds(node):
            for key in (*PARTS, *UNIONS):
                value = node.get(key, [])
                yield from (
                    part for part in (value if isinstance(value, list) else [value]) if isinstance(part, Mapping)
                )
            if "$ref" in node:
                yield node
        for value in node.values():
            yield from _compositions(value)
