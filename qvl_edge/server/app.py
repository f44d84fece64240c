"""The server as an ASGI application: completions, models, health, metrics, the OpenAPI document and the page."""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from qvl_edge.engine.worker import Worker
from qvl_edge.memory import device_memory, resident_bytes
from qvl_edge.server import page, protocol
from qvl_edge.server.callers import Caller
from qvl_edge.server.chat import chat_endpoint
from qvl_edge.server.completions import completion_endpoint
from qvl_edge.server.endpoint import Backend, json_response
from qvl_edge.server.guard import Guard, log_refusal, respond
from qvl_edge.server.metrics import Metrics
from qvl_edge.server.openapi import document
from qvl_edge.server.refusal import SERVER, Refusal, engine_refusal
from qvl_edge.server.responses import response_endpoint
from qvl_edge.server.settings import Settings


def create_app(worker: Worker, settings: Settings) -> ASGIApp:
    """The server as an ASGI application; it closes `worker` when it ends."""
    return _Server(worker, replace(settings, media=settings.media.for_model(worker.runtime))).app


class _Server:
    def __init__(self, worker: Worker, settings: Settings):
        self.worker, self.settings = worker, settings
        self.metrics = Metrics()
        created = int(time.time())
        self.cards = {
            name: protocol.ModelCard(
                id=name,
                object="model",
                created=created,
                owned_by="qvl-edge",
                max_model_len=settings.max_model_len,
                max_images=settings.limits.images,
            )
            for name in settings.names
        }
        backend = Backend(worker, settings, self.metrics)
        endpoints = chat_endpoint(backend), completion_endpoint(backend), response_endpoint(backend)
        self.document = document(*(each.model for each in endpoints), keyed=settings.access.keyed)
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),  # a name may have slashes
            Route("/v1/chat/completions", endpoints[0], methods=["POST"]),
            Route("/v1/completions", endpoints[1], methods=["POST"]),
            Route("/v1/responses", endpoints[2], methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/openapi.json", self.openapi),
            *(Route(path, _file(file)) for path, file in page.FILES.items()),
        ]
        self.paths = [route.path for route in routes]
        inside = Starlette(
            routes=routes,
            lifespan=self.lifespan,
            exception_handlers={HTTPException: self.on_http, Refusal: _on_refusal, Exception: _on_bug},
        )
        self.app: ASGIApp = Guard(inside, settings.access, self.count)
        if settings.access.origins:
            # outside of the guard: a browser asks for leave without the key
            self.app = CORSMiddleware(
                self.app,
                allow_origins=settings.access.origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # OpenAI's client sends a dozen of its own
                expose_headers=["x-request-id", "retry-after"],
            )

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.worker.close)

    def count(self, path: str, status: int, caller: Caller | None) -> None:
        # only our own paths become labels: callers could make up others without end
        self.metrics.requests[path if path in self.paths else "other", status] += 1
        if caller is not None:
            self.metrics.requests_by_key[caller.name, status] += 1

    async def on_http(self, request: Request, error: Exception) -> Response:
        """What starlette refuses."""
        assert isinstance(error, HTTPException)
        path = request.url.path
        if not re.fullmatch(r"[\w./-]{1,60}", path, re.ASCII):
            path = "such path"
        there = ", ".join(path for path in self.paths if path.startswith("/v1/"))
        messages = {
            404: (f"there is no {path} here; there are {there}", "not_found"),
            405: (f"{path} is not for {request.method}", "method_not_allowed"),
        }
        message, code = messages.get(error.status_code, ("the request cannot be read", "bad_request"))
        return respond(Refusal(error.status_code, message, code=code, headers=dict(error.headers or {})))

    async def health(self, request: Request) -> Response:
        if not self.worker.healthy:
            message = "decoding has failed and the log says why; if this stays so, restart the server"
            raise Refusal(503, message, code="engine_failed", kind=SERVER)
        return json_response(protocol.Health(status="ok"))

    async def models(self, request: Request) -> Response:
        return json_response(protocol.ModelList(object="list", data=list(self.cards.values())))

    async def model(self, request: Request) -> Response:
        card = self.cards.get(request.path_params["model"])
        if card is None:
            message = f"this model is not served here; there is {', '.join(self.cards)}"
            raise Refusal(404, message, code="model_not_found", param="model")
        return json_response(card)

    async def show_metrics(self, request: Request) -> Response:
        device = self.worker.device
        memory = {"process_resident_memory_bytes": ("Memory of the server's process.", resident_bytes())}
        if device.type == "cuda":
            card = await asyncio.to_thread(device_memory, device)
            memory["qvl_edge_gpu_memory_used_bytes"] = (
                "Memory in use on the GPU, by all programs.",
                card.total - card.free,
            )
            memory["qvl_edge_gpu_memory_bytes"] = ("Memory of the GPU.", card.total)
        text = self.metrics.render(waiting=self.worker.waiting, running=self.worker.running, memory=memory)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self.document)


def _file(file: Path) -> Any:
    """An endpoint for one file of the page, which is read once: no path of a request ever reaches the disk."""
    content, kind = file.read_bytes(), page.KINDS[file.suffix]

    async def endpoint(request: Request) -> Response:
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    return endpoint


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    log_refusal(error, request.method)
    return respond(error)


async def _on_bug(request: Request, error: Exception) -> Response:
    return respond(engine_refusal(error))
