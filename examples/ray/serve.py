"""Answers over HTTP from several replicas, on Ray Serve: python -m examples.ray.serve [--bundle BUNDLE] [--replicas 2]

POST /answer {"images": ["data:image/png;base64,…"], "question": "…", "options": {"temperature": 0}} -> Answer.to_dict()
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from typing import Annotated, Any, TypeAlias

import ray
from pydantic import Field, ValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from examples.ray.cluster import add_arguments, loading_of, start_ray
from qvl_edge.answer import Answer
from qvl_edge.engine.request import Request as Asked
from qvl_edge.engine.worker import PREFETCH, Worker
from qvl_edge.errors import EngineError, QvlError
from qvl_edge.runtime import Runtime
from qvl_edge.server import fields
from qvl_edge.server.guard import Access, parse_json, read_body, respond
from qvl_edge.server.media import Media
from qvl_edge.server.refusal import RATE_LIMIT, SERVER, Refusal, engine_refusal, validation_refusal

NAME, ROUTE = "qvl-edge", "/answer"
TIME_LIMIT_S = 300.0  # per request, including all tries
TRIES = 3  # replicas per request: one that crashes them must not take down all
PAUSE_S = 0.1  # between tries: a replica that is briefly unreachable must not use up all of them
MAX_BODY_BYTES = 32 << 20
MAX_IMAGES = 16
MEDIA = Media()  # data URIs only: no files, no downloads

Query: TypeAlias = list[dict[str, Any]]
log = logging.getLogger("ray.serve")


class Options(fields.Request):
    """Generation options, as of chat completions."""

    model: str = ""  # there is one


class Question(fields.Received):
    """The body of a request."""

    images: Annotated[list[str], Field(max_length=MAX_IMAGES)] = []
    question: str
    options: Options = Options()


class Model:
    """A replica: one Runtime, whose worker batches concurrent requests."""

    def __init__(self, loading: dict[str, Any]):
        self._worker = Worker(Runtime.from_pretrained(**loading), max_waiting=sys.maxsize)  # Ingress has the limit

    async def answer(self, query: Query, generation: dict[str, Any], seconds: float) -> tuple[int, dict[str, Any]]:
        """Status and body of the response. Serve cancels this when the client disconnects, which stops the decoding."""
        asked = Asked(query, generation=generation, time_limit_s=seconds)
        try:
            async with contextlib.aclosing(self._worker.stream([asked])) as events:
                (answer,) = [event async for _, event in events if isinstance(event, Answer)]
            return 200, answer.to_dict()
        except (QvlError, EngineError) as error:
            refusal = engine_refusal(error)
        return refusal.status, refusal.body.model_dump()


class Ingress:
    """The HTTP endpoint: checks a request, sends it to a replica, and to another one if that dies.

    Serve itself retries only requests that had not reached their replica. Answering has no side effects, so here all
    may be retried.
    """

    def __init__(self, model: DeploymentHandle, access: Access, room: int):
        self._model, self._access, self._room = model, access, room
        self._here = 0

    async def __call__(self, request: Request) -> Response:
        """One request. The header x-tries has the number of replicas that worked on it."""
        self._here += 1
        try:
            self._access.check(ROUTE, dict(request.scope["headers"]))
            if request.method != "POST":
                raise Refusal(405, "send a POST", headers={"allow": "POST"})
            if self._here > self._room:  # before the body is read into memory
                message = f"{self._room} requests are here already; try again later"
                raise Refusal(429, message, kind=RATE_LIMIT, headers={"retry-after": "1"})
            query, generation = await read_question(await read_body(request, MAX_BODY_BYTES))
            return await self._answer(query, generation)
        except Refusal as refusal:
            return respond(refusal)
        finally:
            self._here -= 1

    async def _answer(self, query: Query, generation: dict[str, Any]) -> Response:
        deadline = time.monotonic() + TIME_LIMIT_S
        for tries in range(1, TRIES + 1):
            try:
                async with asyncio.timeout(deadline - time.monotonic()):  # includes the wait for a replica
                    left = deadline - time.monotonic()
                    status, body = await self._model.answer.remote(query, generation, left)
                return JSONResponse(body, status, {"x-tries": str(tries)})
            except RayActorError as error:
                log.warning("%s with a request in flight, which goes to another replica", type(error).__name__)
                await asyncio.sleep(PAUSE_S)
            except TimeoutError:
                message = f"the request exceeded its time limit of {TIME_LIMIT_S:g} s"
                raise Refusal(503, message, kind=SERVER) from None
        raise Refusal(503, f"{TRIES} replicas died while they worked on this request", kind=SERVER)


async def read_question(body: bytes) -> tuple[Query, dict[str, Any]]:
    """(query with images as bytes, generation options) of a request's JSON. Refusal 400 names the field."""
    try:
        asked = Question.model_validate(parse_json(body))
    except ValidationError as error:
        raise validation_refusal(error, (), Question.model_fields) from None
    pictures = [{"image": await MEDIA.load(url, f"images[{index}]")} for index, url in enumerate(asked.images)]
    return [*pictures, {"text": asked.question}], asked.options.generation()


def application(args: argparse.Namespace, access: Access) -> serve.Application:
    """The two deployments. Autoscaling aims at `slots` requests per replica."""
    most = max(args.replicas, args.max_replicas or 0)
    model = serve.deployment(
        autoscaling_config={"min_replicas": args.replicas, "max_replicas": most, "target_ongoing_requests": args.slots},
        # as many as a replica can decode or prefetch; the others wait in Ingress for the first free replica
        max_ongoing_requests=args.slots + PREFETCH,
        graceful_shutdown_timeout_s=TIME_LIMIT_S,  # a replica finishes its answers before it stops
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
    )(Model)
    room = 4 * most * args.slots  # three waiting per decoded one
    ingress = serve.deployment(
        max_ongoing_requests=10 * room,  # the excess gets 429 immediately
        ray_actor_options={"num_cpus": 0},  # mostly idle
    )(Ingress)
    return ingress.bind(model.bind(loading_of(args)), access, room)


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m examples.ray.serve", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="minimum (1)")
    parser.add_argument("--max-replicas", type=int, metavar="N", help="maximum, when requests queue (--replicas)")
    parser.add_argument("--host", default="127.0.0.1", help="others need a key in QVL_EDGE_API_KEY (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(arguments)
    try:
        access = Access(args.host, os.environ.get("QVL_EDGE_API_KEY"))
    except QvlError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    start_ray(args.address)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        serve.start(http_options={"host": args.host, "port": args.port})
        serve.run(application(args, access), name=NAME, route_prefix=ROUTE)
        print(f"answering on http://{args.host}:{args.port}{ROUTE}", flush=True)
        signal.pause()
    serve.delete(NAME)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
