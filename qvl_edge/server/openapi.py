"""The OpenAPI document of the server: its paths, over the schemas of protocol.py. The tests fuzz the server by it."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from qvl_edge import __version__
from qvl_edge.server import protocol
from qvl_edge.server.completions import Completion, CompletionRequest
from qvl_edge.server.fields import Request
from qvl_edge.server.protocol import ChatCompletionRequest
from qvl_edge.server.refusal import ErrorResponse
from qvl_edge.server.responses import ResponseBody, ResponseEvent, ResponseRequest

ERRORS = {
    400: "the request is wrong; `param` says where",
    401: "the key is missing or wrong",
    404: "the model is not served here",
    413: "the body is too large",
    415: "the body is not declared as JSON",
    429: "too many requests are waiting; Retry-After says when to try again",
    500: "a bug of the server",
    503: "no memory or no time for this request, or the server is stopping or has failed",
}


# path, request, responses, of which the first is the whole one, what it does
OPERATIONS: tuple[tuple[str, type[Request], tuple[type[BaseModel], ...], str], ...] = (
    (
        "/v1/chat/completions",
        ChatCompletionRequest,
        (protocol.ChatCompletion, protocol.ChatCompletionChunk),
        "Answer about text and images. With stream=true: server-sent events, each a ChatCompletionChunk or an "
        "ErrorResponse, then `data: [DONE]`.",
    ),
    (
        "/v1/completions",
        CompletionRequest,
        (Completion,),
        "Continue text as it is. With stream=true: server-sent events, each a Completion or an ErrorResponse, then "
        "`data: [DONE]`.",
    ),
    (
        "/v1/responses",
        ResponseRequest,
        (ResponseBody, ResponseEvent),
        "Answer about text and images; nothing is kept. With stream=true: server-sent events, each a ResponseEvent.",
    ),
)


def document(*requests: type[Request], keyed: bool) -> dict[str, Any]:
    """OpenAPI 3.1 of a server that takes these requests. keyed: whether it wants an API key."""
    sent: list[type[BaseModel]] = [protocol.Health, protocol.ModelList, protocol.ModelCard, ErrorResponse]
    posts = {}
    text: dict[str, Any] = {"schema": {"type": "string"}}
    events: dict[str, Any] = {"schema": {}}  # OpenAPI 3.1 has no words for them
    for request in requests:
        path, responses, summary = next((p, r, s) for p, base, r, s in OPERATIONS if issubclass(request, base))
        sent += responses
        post = _operation(summary, _json(responses[0]) | {"text/event-stream": events}, *ERRORS)
        posts[path] = {"post": post | {"requestBody": {"required": True, "content": _json(request)}}}
    modes: list[tuple[type[Any], JsonSchemaMode]] = [(model, "validation") for model in requests]
    modes += [(model, "serialization") for model in sent]
    _, schemas = models_json_schema(modes, ref_template="#/components/schemas/{model}")
    health = _operation("Whether requests can be answered. Needs no key.", _json(protocol.Health), 503)
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    card = _operation("The model of this name.", _json(protocol.ModelCard), 401, 404) | {"parameters": [name]}
    about = {"title": "qvl-edge", "version": __version__}
    return {
        "openapi": "3.1.0",
        "info": about | {"description": "Qwen-VL under OpenAI's API, with boxes in pixels."},
        "security": [{"key": []}] if keyed else [],
        "paths": {
            "/health": {"get": health | {"security": []}},
            "/v1/models": {"get": _operation("The model that is served.", _json(protocol.ModelList), 401)},
            "/v1/models/{model}": {"get": card},
            "/metrics": {"get": _operation("Prometheus' text format.", {"text/plain": text}, 401)},
            "/openapi.json": {"get": _operation("This document.", {"application/json": {}}, 401)},
            **posts,
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas["$defs"],
        },
    }


def _operation(summary: str, content: dict[str, Any], *errors: int) -> dict[str, Any]:
    refused = {str(status): {"description": ERRORS[status], "content": _json(ErrorResponse)} for status in errors}
    return {"summary": summary, "responses": {"200": {"description": summary, "content": content}, **refused}}


def _json(model: type[Any]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
