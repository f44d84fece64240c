"""The server as an ASGI application: chat completions, models, health, metrics, the OpenAPI document and the page."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from qvl_edge.engine.worker import Worker
from qvl_edge.server import protocol
from qvl_edge.server.chat import Chat, Settings, json_response
from qvl_edge.server.guard import Guard, log_refusal, respond
from qvl_edge.server.metrics import Metrics
from qvl_edge.server.openapi import document
from qvl_edge.server.refusal import SERVER, Refusal, engine_refusal

STATIC = Path(__file__).with_name("static")
PAGE = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}


def create_app(worker: Worker, settings: Settings) -> ASGIApp:
    """The server as an ASGI application; it closes `worker` when it ends."""
    return _Server(worker, settings).app


class _Server:
    def __init__(self, worker: Worker, settings: Settings):
        self.worker, self.settings = worker, settings
        self.metrics = Metrics()
        self.card = protocol.ModelCard(
            id=settings.model,
            object="model",
            created=int(time.time()),
            owned_by="qvl-edge",
            max_model_len=settings.max_model_len,
            max_images=settings.limits.images,
        )
        chat = Chat(worker, settings, self.metrics)
        self.document = document(chat.model, keyed=settings.access.api_key is not None)
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{model}", self.model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/openapi.json", self.openapi),
            *(Route(path, _file(name, kind)) for path, (name, kind) in PAGE.items()),
        ]
        self.paths = {route.path for route in routes}
        inside = Starlette(
            routes=routes,
            lifespan=self.lifespan,
            exception_handlers={HTTPException: _on_http, Refusal: _on_refusal, Exception: _on_bug},
        )
        self.app: ASGIApp = Guard(inside, settings.access, self.count)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.worker.close)

    def count(self, path: str, status: int) -> None:
        # only our own paths become labels: callers could make up others without end
        self.metrics.requests[path if path in self.paths else "other", status] += 1

    async def health(self, request: Request) -> Response:
        if not self.worker.healthy:
            message = "decoding has failed and the log says why; if this stays so, restart the server"
            raise Refusal(503, message, code="engine_failed", kind=SERVER)
        return json_response(protocol.Health(status="ok"))

    async def models(self, request: Request) -> Response:
        return json_response(protocol.ModelList(object="list", data=[self.card]))

    async def model(self, request: Request) -> Response:
        if request.path_params["model"] != self.settings.model:
            raise Refusal(404, "this model is not served here", code="model_not_found", param="model")
        return json_response(self.card)

    async def show_metrics(self, request: Request) -> Response:
        text = self.metrics.render(waiting=self.worker.waiting, running=self.worker.running)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self.document)


def _file(name: str, kind: str) -> Any:
    """An endpoint for one file of the page, which is read once: no path of a request ever reaches the disk."""
    content = (STATIC / name).read_bytes()

    async def endpoint(request: Request) -> Response:
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    return endpoint


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    log_refusal(error, request.method)
    return respond(error)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: ("there is no such path", "not_found"),
        405: ("this path has another method", "method_not_allowed"),
    }
    message, code = messages.get(error.status_code, ("the request cannot be read", "bad_request"))
    return respond(Refusal(error.status_code, message, code=code, headers=dict(error.headers or {})))


async def _on_bug(request: Request, error: Exception) -> Response:
    return respond(engine_refusal(error))
