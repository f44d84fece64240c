"""Structured answers: whatever the model would rather say, boxes are well formed and JSON keeps to its schema."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, write_small_checkpoint

from qvl_edge import ConfigError, Runtime, child
from qvl_edge.engine.constraint import MinNewTokens, constraint_for
from qvl_edge.engine.schema import closed
from qvl_edge.text.tokenizer import BOX, BOX_END, IM_END, REF, REF_END, Tokenizer

VOCAB = 512
NUMBER = r"(0|[1-9]\d{0,2})"
WELL_FORMED = re.compile(rf"<box>\({NUMBER},{NUMBER}\),\({NUMBER},{NUMBER}\)</box>")
LABELLED = re.compile(rf"<ref>[^<]+</ref>({WELL_FORMED.pattern})+".replace(NUMBER, r"\d{1,3}"))


def merged_tokenizer() -> Tokenizer:
    """Bytes, and tokens that hold several characters of a box."""
    tokens = [bytes([byte]) for byte in range(256)] + [
        b"),",
        b"),(",
        b",(",
        b"12",
        b"0,",
        b"00",
        b"(0",
        b"1)",
        b"((",
        b"x)",
    ]
    return Tokenizer({token: rank for rank, token in enumerate(tokens)})


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), merged_tokenizer()], ids=["bytes", "merged"])
@pytest.mark.slow
def test_every_walk_that_the_grammar_allows_is_well_formed_and_none_gets_stuck(tokenizer: Tokenizer) -> None:
    stop = tokenizer.specials[IM_END]
    rng = random.Random(0)
    favoured = [tokenizer.specials[name] for name in (REF, REF_END, BOX, BOX_END)]
    seen, boxes = set(), 0
    for _ in range(300):
        grammar, ids = constraint_for({"type": "boxes"}, tokenizer, VOCAB, frozenset({stop})), []
        assert grammar is not None
        for _ in range(60):
            allowed = grammar.allowed().nonzero().flatten().tolist()
            assert allowed, f"stuck after {tokenizer.decode(ids)!r}"
            # letters for labels and text, as bytes that are no characters would hide what is between them
            letters = [token for token in allowed if token in range(97, 123)]
            wanted = [token for token in allowed if token in favoured]
            token = rng.choice(wanted if wanted and rng.random() < 0.6 else letters or allowed)
            if token == stop:
                break
            seen.add(token)
            ids.append(token)
            grammar.accept(token)
        text = tokenizer.decode(ids)
        whole = text[: text.rfind("</box>") + 6] if "</box>" in text else ""
        found = WELL_FORMED.findall(whole)
        assert len(found) == whole.count("<box>") == whole.count("</box>")
        assert whole.count("<ref>") == len(LABELLED.findall(whole))
        boxes += len(found)
    assert boxes > 100 and set(favoured) <= seen
    if tokenizer.vocab_size > byte_tokenizer().vocab_size:
        assert {256, 257, 258, 259, 260}.issubset(seen)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory, vit_cache: Path) -> Runtime:
    path = write_small_checkpoint(tmp_path_factory.mktemp("constraint") / "checkpoint")
    return Runtime.from_pretrained(path, cache_dir=vit_cache, max_context=1024)


@pytest.mark.parametrize("seed", range(6))
def test_a_random_model_gives_json_that_keeps_to_the_schema(runtime: Runtime, seed: int) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "blue"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "box": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 999},
                "minItems": 4,
                "maxItems": 4,
            },
        },
        "required": ["colour", "count", "box"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    answer = runtime.answer("What is it?", response_format=wanted, do_sample=True, seed=seed, max_new_tokens=200)
    found = json.loads(answer.text)
    assert answer.finish_reason == "stop"
    assert set(found) == {"colour", "count", "box"} and found["colour"] in ("red", "blue")
    assert 0 <= found["count"] <= 99 and len(found["box"]) == 4 and all(0 <= x <= 999 for x in found["box"])


def test_a_random_model_gives_well_formed_boxes(runtime: Runtime) -> None:
    text = "".join(
        runtime.answer("Where?", response_format={"type": "boxes"}, do_sample=True, seed=seed, temperature=3.0).text
        for seed in range(20)
    )
    assert text.count("</box>") == len(WELL_FORMED.findall(text))


def test_a_constraint_does_not_change_what_keeps_to_it_anyway(runtime: Runtime) -> None:
    free = runtime.answer("Hello", do_sample=False, max_new_tokens=12)
    assert (
        runtime.answer("Hello", do_sample=False, max_new_tokens=12, response_format={"type": "text"}).token_ids
        == free.token_ids
    )


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"type": "xml"}, "type 'xml', known are 'text', 'boxes'"),
        ("json", "type None"),
        ({"type": "json_schema"}, "no schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "shcema": {}}}, "json_schema has 'shcema'"),
        (
            {"type": "json_object", "json_schema": {}},
            "with type 'json_object' known are type, schema",
        ),
        ({"type": "text", "schema": {}}, "has 'schema'; with type 'text' known are type"),
        ({"type": "json_object", "schema": 3}, "no schema"),
        ({"type": "regex"}, "no pattern"),
        ({"type": "regex", "regex": "("}, "cannot be used"),
        ({"type": "choice", "choice": ["a", ""]}, "no choices"),
        ({"type": "choice", "choice": []}, "no choices"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}, "cannot be used"),
        ({"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 100_000]}}}, "characters, at most"),
    ],
)
def test_a_format_that_cannot_be_used_says_why(wanted, said: str) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(ConfigError, match=said):
        constraint_for(wanted, byte_tokenizer(), VOCAB, frozenset({300}))


A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
DEFINED = {"$defs": {"A": A}}
NODE = {"type": "object", "required": ["v", "next"]}
NODE["properties"] = {"v": A, "next": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}}
EXTRA = '{"a": 1, "z": 1}'


def accepts(schema: dict, said: str) -> bool:
    """Whether a schema's grammar leads to the end by way of `said`."""
    grammar = constraint_for({"type": "json_object", "schema": schema}, byte_tokenizer(), VOCAB, frozenset({300}))
    for byte in said.encode():
        if not grammar.allowed()[byte]:
            return False
        grammar.accept(byte)
    return bool(grammar.allowed()[300])


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (A, '{"a": 1}', EXTRA),
        ({**A, "additionalProperties": True}, EXTRA, "{}"),
        ({**A, "patternProperties": {"^z": {}}}, EXTRA, '{"a": 1, "y": 1}'),
        ({"type": "object"}, EXTRA, "[]"),
        ({"type": "array", "items": A}, '[{"a": 1}, {"a": 2}]', f"[{EXTRA}]"),
        ({"anyOf": [A, B]}, '{"b": 1}', EXTRA),
        ({"allOf": [A, B]}, '{"a": 1, "b": 1}', '{"a": 1, "b": 1, "z": 1}'),
        ({**DEFINED, "$ref": "#/$defs/A"}, '{"a": 1}', EXTRA),
        ({**DEFINED, "allOf": [{"$ref": "#/$defs/A"}]}, '{"a": 1}', EXTRA),
        ({**DEFINED, "allOf": [{"$ref": "#/$defs/A"}, B]}, '{"a": 1, "b": 1}', '{"a": 1, "b": 1, "z": 1}'),
        ({**DEFINED, "allOf": [{"$ref": "#/$defs/A"}, {"additionalProperties": {"type": "integer"}}]}, EXTRA, "{}"),
        ({**A, "anyOf": [B, {"required": ["a"]}]}, '{"a": 1, "b": 1}', EXTRA),
        ({"$defs": {"N": NODE}, "$ref": "#/$defs/N"}, '{"v": {"a": 1}, "next": null}', 
         
         f'{{"v": {EXTRA}, "next": null}}'),
        ({"type": "object", "properties": {"properties": A}}, '{"properties": {"a": 1}}', f'{{"properties": {EXTRA}}}'),
        ({"enum": [{"properties": None}]}, '{"properties": null}', "{}"),
    ],
)  # fmt: skip
def test_an_object_has_the_properties_that_are_named_unless_the_schema_says_otherwise(
    schema: dict, good: str, bad: str
) -> None:
    pytest.importorskip("llguidance")
    before = json.dumps(schema)
    assert accepts(schema, good) and not accepts(schema, bad)
    assert json.dumps(schema) == before


def test_closing_a_schema_takes_no_time_that_its_references_multiply() -> None:
    definitions = {f"D{i}": {"allOf": [{"$ref": f"#/$defs/D{i + 1}"}] * 2} for i in range(60)}
    assert closed({"$defs": definitions, "allOf": [{"$ref": "#/$defs/D0"}, A]})["properties"] == {"a": True}
    chain = {f"D{i}": {"allOf": [{"$ref": f"#/$defs/D{i + 1}"}]} for i in range(2000)} | {"D2000": A}
    assert closed({"$defs": chain, "allOf": [{"$ref": "#/$defs/D0"}]})["properties"] == {"a": True}


@pytest.mark.parametrize("seed", range(3))
def test_a_random_model_keeps_to_a_pattern_and_to_choices(runtime: Runtime, seed: int) -> None:
    pytest.importorskip("llguidance")
    sampled = {"do_sample": True, "seed": seed, "max_new_tokens": 60}
    pattern = runtime.answer("?", response_format={"type": "regex", "regex": r"[a-f]{3}-\d{2}"}, **sampled)
    assert re.fullmatch(r"[a-f]{3}-\d{2}", pattern.text) and pattern.finish_reason == "stop"
    words = ['a "quoted" one', "zwei\nZeilen", "否"]
    chosen = runtime.answer("?", response_format={"type": "choice", "choice": words}, **sampled)
    assert chosen.text in words and chosen.finish_reason == "stop"


def test_a_stop_token_ends_the_answer_and_is_not_in_its_text(runtime: Runtime) -> None:
    free = runtime.answer("Hello", do_sample=False, max_new_tokens=12, ignore_eos=True)
    token = free.token_ids[5]
    first = free.token_ids.index(token)
    for eos in (False, True):
        options = {"do_sample": False, "max_new_tokens": 12, "stop_token_ids": [token], "ignore_eos": eos}
        cut = runtime.answer("Hello", **options)
        assert (cut.token_ids, cut.finish_reason) == (free.token_ids[: first + 1], "stop")
        longer = runtime.answer("Hello", min_new_tokens=first + 2, **options)
        assert len(longer.token_ids) >= first + 2 and token not in longer.token_ids[: first + 1]
    with pytest.raises(ConfigError, match="stop_token_ids has token id 70000, expected ids below"):
        runtime.answer("Hello", stop_token_ids=[70000])
    with pytest.raises(ConfigError, match="logit_bias has token id 70000"):
        runtime.answer("Hello", logit_bias={"70000": 1})


@pytest.mark.parametrize("kind", ["json_object", "boxes"])
def test_without_the_package_a_format_names_the_command_that_installs_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="pip install 'qvl-edge"):
        constraint_for(
            {"type": kind},
            Tokenizer(dict(byte_tokenizer().encoding._mergeable_ranks)),
            VOCAB,
            frozenset({300}),
        )


def test_masks_cover_the_whole_vocabulary() -> None:
    pytest.importorskip("llguidance")
    for kind in ("boxes", "json_object"):
        constraint = constraint_for({"type": kind}, byte_tokenizer(), VOCAB, frozenset({300}))
        assert constraint is not None
        mask = constraint.allowed()
        assert mask.shape == (VOCAB,) and mask.dtype == torch.bool and bool(mask.any())


class Only:
    """Allows some ids of four."""

    def __init__(self, *ids: int):
        self.mask = torch.zeros(4, dtype=torch.bool)
        self.mask[list(ids)] = True

    def allowed(self) -> torch.Tensor:
        return self.mask

    def accept(self, token: int) -> None:
        pass


def test_the_end_comes_early_only_where_the_format_leaves_nothing_else() -> None:
    assert MinNewTokens(2, frozenset({3}), 4, Only(1, 3)).allowed().tolist() == [False, True, False, False]
    assert MinNewTokens(2, frozenset({3}), 4, Only(3)).allowed().tolist() == [False, False, False, True]
    constraint = MinNewTokens(1, frozenset({3}), 4)
    constraint.accept(0)
    assert constraint.allowed().all()


def test_a_schema_that_compiles_for_ever_is_refused_once_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, started = byte_tokenizer(), []
    start = child.start
    monkeypatch.setattr(child, "start", lambda *a, **options: started.append(a) or start(*a, **options))
    monkeypatch.setattr("qvl_edge.engine.compile_check.WALL_S", 1)
    schema = {"type": "integer", "multipleOf": 10_000_019}
    for _ in range(2):
        with pytest.raises(ConfigError, match="to compile; make it simpler"):
            constraint_for({"type": "json_schema", "json_schema": {"schema": schema}}, tokenizer, VOCAB, frozenset({2}))
    assert len(started) == 1
