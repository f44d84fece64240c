"""The API described for machines (OpenAPI 3.1), written by hand and fuzzed against the server in the tests."""

from typing import Any

from qvl_edge import __version__
from qvl_edge.engine.constraint import FORMATS
from qvl_edge.server.chat import MAX_INT, MAX_STOPS, MAX_TOP_LOGPROBS, NEUTRAL, SEEDS, WITHOUT_EFFECT, Limits
from qvl_edge.text.boxes import GRID

Schema = dict[str, Any]


def document(model: str, limits: Limits, *, keyed: bool) -> dict[str, Any]:
    """The OpenAPI document of a server for `model`; keyed: whether it wants an API key."""
    chat_errors = {status: _error(what) for status, what in _CHAT_ERRORS.items()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "qvl-edge",
            "version": __version__,
            "description": "Qwen-VL under OpenAI's chat completions, with boxes in pixels.",
        },
        "security": [{"key": []}] if keyed else [],
        "paths": {
            "/health": _get("Whether the server is up. Needs no key.", "Health", security=[]),
            "/v1/models": _get("The one model that is served.", "Models"),
            "/v1/models/{model}": {
                **_get("The model of this name.", "Model", {"404": _error("no such model")}),
                "parameters": [_path_parameter("model", {"type": "string", "minLength": 1})],
            },
            "/metrics": _get("Prometheus' text format.", None),
            "/openapi.json": _get("This document.", "Document"),
            "/v1/chat/completions": {
                "post": {
                    "operationId": "chat",
                    "summary": "Answer about text and images.",
                    "requestBody": {"required": True, "content": _json("ChatRequest")},
                    "responses": {
                        "200": {
                            "description": "The answer; with stream=true server-sent events, each a ChatChunk or an "
                            "Error, then `data: [DONE]`.",
                            "content": {**_json("ChatResponse"), "text/event-stream": {"schema": {"type": "string"}}},
                        },
                        **chat_errors,
                    },
                }
            },
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {**_schemas(limits), "ChatRequest": _request(model, limits)},
        },
    }


_CHAT_ERRORS = {
    "400": "the request is wrong; `param` says where",
    "401": "the key is missing or wrong",
    "404": "the model is not served here",
    "413": "the body is too large",
    "415": "the body is not declared as JSON",
    "429": "too many requests wait; Retry-After says when to come back",
    "500": "a bug of the server",
    "503": "no memory or no time for this request, or the server is stopping",
}


def _request(model: str, limits: Limits) -> Schema:
    nullable_bool = {"type": ["boolean", "null"]}
    stop = {"type": "string", "minLength": 1}
    properties: Schema = {
        "model": {"const": model},
        "messages": {
            "type": "array",
            "items": {"oneOf": [_ref("SystemMessage"), _ref("UserMessage"), _ref("AssistantMessage")]},
            "minItems": 1,
            "maxItems": limits.messages,
            "description": "A system message first, if any; then user and assistant in turns; the user last. "
            f"At most {limits.images} images.",
        },
        "max_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_INT},
        "max_completion_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_INT},
        "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2, "description": "0: greedy"},
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_INT, "description": "0: all tokens"},
        "repetition_penalty": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 10},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": limits.n},
        "seed": {"type": ["integer", "null"], "minimum": SEEDS[0], "maximum": SEEDS[1]},
        "stop": {"anyOf": [stop, {"type": "array", "items": stop, "maxItems": MAX_STOPS}, {"type": "null"}]},
        "stream": nullable_bool,
        "stream_options": {
            "type": ["object", "null"],
            "properties": {"include_usage": nullable_bool, "include_obfuscation": {}},
            "additionalProperties": False,
        },
        "logprobs": nullable_bool,
        "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_TOP_LOGPROBS},
        "response_format": {
            "type": ["object", "null"],
            "properties": {"type": {"enum": list(FORMATS)}},
            "required": ["type"],
        },
        **{name: {"enum": [*values, None]} for name, values in NEUTRAL.items()},
        **{name: {"description": "taken and without effect"} for name in sorted(WITHOUT_EFFECT)},
    }
    return {
        "type": "object",
        "properties": properties,
        "required": ["model", "messages"],
        "additionalProperties": False,
        "not": {"required": ["max_tokens", "max_completion_tokens"]},
    }


def _schemas(limits: Limits) -> Schema:
    text_part = _object({"type": {"const": "text"}, "text": {"type": "string"}})
    image_url = _object({"url": {"type": "string"}, "detail": {"enum": ["auto", "low", "high", "original"]}}, ["url"])
    image_part = _object({"type": {"const": "image_url"}, "image_url": image_url})
    text = {"anyOf": [{"type": "string"}, {"type": "array", "items": text_part, "minItems": 1}]}
    parts = {"type": "array", "items": {"oneOf": [text_part, image_part]}, "minItems": 1}
    name = {"name": {"type": "string"}}
    corners = {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4}
    points = {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}, "minItems": 4, "maxItems": 4}
    box = _object(
        {
            "label": {"type": ["string", "null"]},
            "corners": {**corners, "description": f"x1, y1, x2, y2 from 0 to {GRID}, as the model wrote them"},
            "pixels": {**corners, "description": "x1, y1, x2, y2 in pixels of the image as it was sent"},
            "image": {"type": "integer", "minimum": 0, "description": "which of the request's images, from 0"},
            "quad": points,
            "quad_pixels": points,
        },
        ["label", "corners", "pixels", "image"],
    )
    boxes = {"type": "array", "items": _ref("Box")}
    count = {"type": "integer", "minimum": 0}
    usage = _object(
        {
            "prompt_tokens": count,
            "completion_tokens": count,
            "total_tokens": count,
            "prompt_tokens_details": _object({"cached_tokens": count}),
        }
    )
    finish = {"enum": ["stop", "length"]}
    logprobs = {"type": ["object", "null"]}
    message = _object(
        {
            "role": {"const": "assistant"},
            "content": {"type": "string"},
            "refusal": {"type": "null"},
            "boxes": boxes,
        }
    )
    choice = _object({"index": count, "message": message, "logprobs": logprobs, "finish_reason": finish})
    delta = _object({"role": {"const": "assistant"}, "content": {"type": "string"}, "boxes": boxes}, [])
    piece = _object(
        {"index": count, "delta": delta, "logprobs": logprobs, "finish_reason": {"enum": ["stop", "length", None]}}
    )
    head = {"id": {"type": "string"}, "created": count, "model": {"type": "string"}}
    model = _object(
        {
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": count,
            "owned_by": {"type": "string"},
            "max_model_len": count,
            "max_images": count,
        }
    )
    nullable = {"type": ["string", "null"]}
    error = _object({"message": {"type": "string"}, "type": {"type": "string"}, "param": nullable, "code": nullable})
    return {
        "SystemMessage": _object({"role": {"enum": ["system", "developer"]}, "content": text, **name}, _SAID),
        "UserMessage": _object(
            {"role": {"const": "user"}, "content": {"anyOf": [{"type": "string"}, parts]}, **name}, _SAID
        ),
        "AssistantMessage": _object(
            {"role": {"const": "assistant"}, "content": text, "refusal": {"type": "null"}, "boxes": boxes, **name},
            _SAID,
        ),
        "Box": box,
        "Usage": usage,
        "ChatResponse": _object(
            {
                **head,
                "object": {"const": "chat.completion"},
                "choices": {"type": "array", "items": choice, "minItems": 1, "maxItems": limits.n},
                "usage": _ref("Usage"),
            }
        ),
        "ChatChunk": _object(
            {
                **head,
                "object": {"const": "chat.completion.chunk"},
                "choices": {"type": "array", "items": piece, "maxItems": 1},
                "usage": {"anyOf": [_ref("Usage"), {"type": "null"}]},
            },
            [*head, "object", "choices"],
        ),
        "Health": _object({"status": {"const": "ok"}}),
        "Model": model,
        "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}}),
        "Document": {"type": "object"},
        "Error": _object({"error": error}),
    }


_SAID = ["role", "content"]


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str) -> Schema:
    return {"application/json": {"schema": _ref(name)}}


def _error(what: str) -> Schema:
    return {"description": what, "content": _json("Error")}


def _path_parameter(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _get(summary: str, answer: str | None, more: Schema | None = None, **operation: Any) -> Schema:
    content = _json(answer) if answer else {"text/plain": {"schema": {"type": "string"}}}
    responses = {"200": {"description": summary, "content": content}, **(more or {})}
    if operation.get("security") != []:
        responses["401"] = _error(_CHAT_ERRORS["401"])
    return {"get": {"summary": summary, "responses": responses, **operation}}
