"""What all requests have in common: how JSON is read, the generation options, and fields without effect.

What cannot change an answer is accepted, what could is refused. Null is an absent field, at every level. An unknown
field of a request is refused, as OpenAI does: a misspelt `temperature` must not be dropped silently.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core.core_schema import ValidationInfo

from qvl_edge.engine.constraint import MAX_SCHEMA, Format
from qvl_edge.option import INT32_MAX, Option
from qvl_edge.options import MAX_BIAS, GenerationOptions
from qvl_edge.server.refusal import Refusal, invalid, validation_refusal

log = logging.getLogger("qvl_edge.server")

MAX_STOPS = 4  # as OpenAI
MAX_TEMPERATURE = 2  # as OpenAI
MAX_LOGGED = 100  # unknown keys that a server names in its log; callers could make up others without end


class Model(BaseModel):
    """Base of all models: no conversion between types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Received(Model):
    """Base of what requests are made of: null is absent."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if item is not None}
        return value


class Tolerant(Received):
    """Base of the parts whose unknown keys cannot change an answer: they are ignored, and logged once."""

    model_config = ConfigDict(extra="ignore")
    _logged: ClassVar[set[str]] = set()

    @model_validator(mode="before")
    @classmethod
    def _log_unknown(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for key in value.keys() - cls.model_fields.keys() - cls._logged:
                # a name that looks like one; anything else may be somebody's text
                if len(cls._logged) < MAX_LOGGED and re.fullmatch(r"[A-Za-z_]{1,40}", key):
                    cls._logged.add(key)
                    log.info("ignored the unknown key %s", key)
        return value


StopText = Annotated[str, Field(min_length=1)]
SchemaText = Annotated[str, Field(max_length=MAX_SCHEMA)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
NoItems = Annotated[list[Any], Field(max_length=0)]
Nothing = Annotated[dict[str, Any], Field(max_length=0)]
_STOP_TEXT = TypeAdapter[str](StopText)
Stops = Annotated[list[StopText], Field(max_length=MAX_STOPS)]


def _stops(stop: Any) -> Any:
    return [_STOP_TEXT.validate_python(stop)] if isinstance(stop, str) else stop


def option(name: str, most: float | None = None) -> Any:
    """A field with the range and the help of a generation option; `most`: OpenAI's own limit."""
    details: Option = next(item for item in fields(GenerationOptions) if item.name == name).metadata["option"]
    low: dict[str, Any] = {"gt" if details.above else "ge": details.least}
    return Field(None, le=details.most if most is None else most, description=details.help, **low)


# how clients write "as much as there is" and "none given"
UNLIMITED = {"max_tokens": INT32_MAX, "max_completion_tokens": INT32_MAX, "max_output_tokens": INT32_MAX, "top_k": 0}
# under the names of OpenAI and vLLM -> under those of GenerationOptions
RENAMED = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}


class JsonSchema(Received):
    """OpenAI's json_schema."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Received):
    """As OpenAI's, and {"type": "boxes"}: whatever boxes the answer has are well formed."""

    type: Format
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="of json_object, as llama.cpp takes it")
    regex: str | None = None
    choice: list[str] | None = None


class StructuredOutputs(Received):
    """vLLM's structured_outputs; one of them."""

    json_: dict[str, Any] | SchemaText | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None


class Request(Received):
    """Base of the requests."""

    neutral: ClassVar[Mapping[str, Any]] = {}  # fields of which only the value that changes nothing is accepted
    ignored: ClassVar[tuple[str, ...]] = ()

    model: str
    max_tokens: int | None = option("max_new_tokens")
    min_tokens: int | None = option("min_new_tokens")
    temperature: Number | None = option("temperature", MAX_TEMPERATURE)
    top_p: Number | None = option("top_p")
    top_k: int | None = option("top_k")
    min_p: Number | None = option("min_p")
    repetition_penalty: Number | None = option("repetition_penalty")
    presence_penalty: Number | None = option("presence_penalty")
    frequency_penalty: Number | None = option("frequency_penalty")
    logit_bias: dict[str, Bias] | None = None
    seed: int | None = option("seed")
    stop: Annotated[Stops, BeforeValidator(_stops, json_schema_input_type=StopText | Stops)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | SchemaText | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON may write 1 as 1.0
        if type(value) is int and value == -1:
            value = UNLIMITED.get(info.field_name or "", value)
        return value

    @classmethod
    def parse(cls, body: Any) -> Self:
        """From parsed JSON. Refusal names the fields that are wrong."""
        if isinstance(body, dict) and body.get("seed") == -1:  # llama.cpp and vLLM: none
            body = {name: value for name, value in body.items() if name != "seed"}
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise validation_refusal(error, cls.neutral, cls.model_fields) from None

    def generation(self) -> dict[str, Any]:
        """The options that were given, under the names of GenerationOptions."""
        names = {item.name: item.name for item in fields(GenerationOptions)} | {v: k for k, v in RENAMED.items()}
        options = {name: getattr(self, given, None) for name, given in names.items() if name != "logprobs"}
        options["response_format"] = self.format()
        return {name: value for name, value in options.items() if value is not None and value != {}}

    def conflicts(self) -> list[Refusal]:
        """Refusals of fields that do not go together."""
        try:
            self.format()
        except Refusal as refusal:
            return [refusal]
        return []

    def format(self) -> dict[str, Any] | None:
        """What the answer must look like, from whichever field says so. Refusal 400 if two do."""
        asked: list[tuple[str, dict[str, Any]]] = []
        if self.response_format is not None and self.response_format.type != "text":
            dump = self.response_format.model_dump(by_alias=True, exclude_unset=True)
            asked.append(("response_format", dump))
        outputs = self.structured_outputs or StructuredOutputs.model_validate({})
        for prefix, given in (
            ("guided_", (self.guided_json, self.guided_regex, self.guided_choice)),
            ("structured_outputs.", (outputs.json_, outputs.regex, outputs.choice)),
        ):
            for name, value in zip(("json", "regex", "choice"), given, strict=True):
                if value is not None:
                    asked.append((prefix + name, _format(prefix + name, name, value)))
        if outputs.json_object:
            asked.append(("structured_outputs.json_object", {"type": "json_object"}))
        if len(asked) > 1:
            raise invalid(asked[1][0], f"{asked[0][0]} says already what the answer is to look like; send one of them")
        return asked[0][1] if asked else None


def _format(param: str, kind: str, value: Any) -> dict[str, Any]:
    if kind != "json":
        return {"type": kind, kind: value}
    if isinstance(value, str):
        try:
            value = TypeAdapter(dict[str, Any]).validate_json(value)
        except ValidationError:
            raise invalid(param, "expected a JSON schema, or its text") from None
    return {"type": "json_schema", "json_schema": {"schema": value}}


# the value that changes nothing, of options that are not here
NEUTRAL: dict[str, Any] = {
    "best_of": Literal[1],
    "use_beam_search": Literal[False],
    "length_penalty": Literal[1],
    "early_stopping": Literal[False],
    "include_stop_str_in_output": Literal[False],
    "skip_special_tokens": bool,  # ours has no special tokens in it but those of boxes, which belong there
    "bad_words": NoItems,
    "allowed_token_ids": NoItems,
    "logits_processors": NoItems,
    "prompt_logprobs": Literal[False],
    "truncate_prompt_tokens": None,
    "guided_grammar": None,
    "grammar": None,
    "typical_p": Literal[1],
    "mirostat": Literal[0],
}
# settings of other servers and of OpenAI's service, of which no answer here depends
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "priority", "request_id", "cache_prompt", "id_slot", "timings_per_token", "keep_alive",
    "add_special_tokens", "spaces_between_special_tokens", "guided_decoding_backend", "return_tokens_as_token_ids",
    "return_token_ids",
)  # fmt: skip


R = TypeVar("R", bound=Request)


def complete(
    base: type[R], names: tuple[str, ...], neutral: Mapping[str, Any], ignored: tuple[str, ...], **narrowed: Any
) -> type[R]:
    """`base` for a model of these names, with fields that are accepted and have no effect."""
    neutral, ignored = {**NEUTRAL, **neutral}, (*IGNORED, *ignored)
    without: dict[str, Any] = {"description": "without effect"}
    made: dict[str, Any] = {
        "model": (Literal[names], ...),
        **{name: (kind if kind is None else kind | None, Field(None, **without)) for name, kind in neutral.items()},
        **{name: (Any, Field(None, **without)) for name in ignored},
        **narrowed,
    }
    model = create_model(base.__name__, __base__=base, __doc__=base.__doc__, **made)
    model.neutral, model.ignored = neutral, ignored
    return model
