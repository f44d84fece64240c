"""Serve an OpenAI-compatible API under /v1, and a page that draws the boxes: qvl-edge serve BUNDLE [--port 8000]"""

import argparse
import hashlib
import ipaddress
import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from qvl_edge import __version__
from qvl_edge.commands import loading
from qvl_edge.errors import ConfigError, QvlError
from qvl_edge.memory import return_buffers
from qvl_edge.options import LoadOptions

if TYPE_CHECKING:
    import uvicorn

    from qvl_edge.engine.worker import Worker
    from qvl_edge.runtime import Runtime
    from qvl_edge.server.media import Media

KEY_VARIABLE = "QVL_EDGE_API_KEY"
FAILED_S = 10.0  # in which /health is 503, for balancers

EXAMPLES = """examples:
  qvl-edge serve BUNDLE
  qvl-edge serve Qwen/Qwen-VL-Chat-Int4 --port 8080 --slots 2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge serve`; Qwen-VL's own openai_api.py and web_demo_mm.py spell some of them differently."""
    loading.add_path(parser, optional=True)
    loading.add_options(parser)
    parser.add_argument("-c", "--checkpoint-path", metavar="PATH", help="the same as BUNDLE")
    parser.add_argument("--cpu-only", dest="device", action="store_const", const="cpu", help="the same as --device cpu")
    parser.add_argument("--max-model-len", dest="max_context", type=int, metavar="N", help="the same as --max-context")
    group = parser.add_argument_group("server")
    group.add_argument("--host", "--server-name", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", "--server-port", type=int, default=8000, help="0: any free one (default: 8000)")
    group.add_argument("--api-key", metavar="KEY", help=f"required from clients (better: in {KEY_VARIABLE})")
    group.add_argument(
        "--api-keys-file", type=Path, metavar="FILE", help="TOML: a table of sha256 and limits for each caller (none)"
    )
    group.add_argument("--share-cache", action="store_true", help="of prompts and pictures between API keys (off)")
    group.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="the model's name; repeatable (default: the folder's)",
    )
    group.add_argument(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="web pages elsewhere that may use the API, as in https://app.example.org; * with a key: all (none)",
    )
    group.add_argument(
        "--slots", "--parallel", type=int, default=4, metavar="N", help="answers generated at once (default: 4)"
    )
    group.add_argument(
        "--max-concurrent-requests",
        type=int,
        default=32,
        metavar="N",
        help="reject requests beyond N with 429 (default: 32)",
    )
    group.add_argument(
        "--time-limit", type=float, default=300.0, metavar="S", help="seconds for one request (default: 300)"
    )
    group.add_argument("--max-body-mb", type=int, default=32, metavar="N", help="of one request (default: 32)")
    group.add_argument(
        "--max-connections", type=int, default=512, metavar="N", help="the longest silent one goes (default: 512)"
    )
    group.add_argument(
        "--max-connections-per-address", type=int, default=256, metavar="N", help="or per IPv6 /64 (default: 256)"
    )
    group.add_argument("--max-images", type=int, default=16, metavar="N", help="in one request (default: 16)")
    group.add_argument("--max-n", type=int, default=8, metavar="N", help="choices in one request (default: 8)")
    group.add_argument(
        "--allowed-local-media-path", type=Path, metavar="FOLDER", help="file:// images below it may be read (none)"
    )
    group.add_argument(
        "--allowed-media-domains",
        nargs="+",
        default=[],
        metavar="HOST",
        help="http(s) images of these hosts are fetched, with :PORT if it is not the default one (none)",
    )


def execute(args: argparse.Namespace) -> int:
    """Check what can be checked, load the model, serve until SIGINT or SIGTERM."""
    path, options, generation = _path(args), LoadOptions.given(args), loading.generation(args)
    try:
        import uvicorn

        from qvl_edge.server.app import Settings, create_app
        from qvl_edge.server.callers import read_callers
        from qvl_edge.server.connection import Connections, configure, within_descriptors
        from qvl_edge.server.guard import Access
        from qvl_edge.server.logs import spare
        from qvl_edge.server.settings import Limits
    except ImportError as error:
        raise QvlError(f"the server needs {error.name}; install it with: pip install 'qvl-edge[serve]'") from None
    from qvl_edge.engine.worker import Worker

    if args.release_vision:
        raise ConfigError("--release-vision drops the cache of running answers; leave it out here")
    loading.check_chat(path, options)
    key = args.api_key if args.api_key is not None else os.environ.get(KEY_VARIABLE)
    callers = () if args.api_keys_file is None else read_callers(args.api_keys_file)
    access = Access(args.host, key, tuple(args.allowed_origins), callers)
    if min(args.max_connections, args.max_connections_per_address) < 1:
        raise ConfigError("--max-connections and --max-connections-per-address are numbers from 1 on")
    media = _media(args)
    listening = _bind(args.host, args.port)  # before the model is loaded: an error about the port comes at once
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    spare(logging.getLogger())
    return_buffers()
    runtime = loading.load(path, options)
    runtime.options = runtime.options.with_overrides(generation)
    runtime.warm_up()  # or the first caller waits for the compiler
    worker = Worker(runtime, max_waiting=args.max_concurrent_requests, time_limit_s=args.time_limit)
    name, *aliases = dict.fromkeys(args.served_model_name or [Path(path).resolve().name])
    settings = Settings(
        model=name,
        aliases=tuple(aliases),
        fingerprint=_fingerprint(runtime),
        max_model_len=runtime.max_context,
        access=access,
        limits=Limits(images=args.max_images, n=args.max_n),
        media=media,
        max_body_bytes=args.max_body_mb << 20,
        max_concurrent=args.max_concurrent_requests,
        share_cache=args.share_cache,
    )
    connections = Connections(within_descriptors(args.max_connections), args.max_connections_per_address)
    config = configure(create_app(worker, settings), connections)
    host, port = listening.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    loading.say(f"serving {settings.model!r}: page http://{place}:{port}/  API http://{place}:{port}/v1")
    server = uvicorn.Server(config)
    threading.Thread(target=_stop_when_failed, args=(server, worker), daemon=True).start()
    if threading.current_thread() is threading.main_thread():
        # uvicorn lets what runs end, then raises SIGTERM again: its default end is a clean one to systemd, 143 is not
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    server.run(sockets=[listening])
    return 1 if worker.failed else 0


def _stop_when_failed(server: "uvicorn.Server", worker: "Worker") -> None:
    """End a server that can never answer again, a little after /health has said so: whatever started it starts it anew.

    As vLLM does it.
    """
    while not worker.failed:
        time.sleep(1)
    logging.error("nothing can be answered any more; the server stops, for its supervisor to start it again")
    time.sleep(FAILED_S)
    server.should_exit = True


def _fingerprint(runtime: "Runtime") -> str:
    """Changes with whatever changes an answer of the same seed: the code, the model's shape, how it is loaded."""
    made = f"{__version__} {runtime.config} {runtime.plan} {runtime.options}"
    return f"fp_{hashlib.sha256(made.encode()).hexdigest()[:12]}"


def _path(args: argparse.Namespace) -> str:
    paths = [path for path in (args.path, args.checkpoint_path) if path is not None]
    if len(paths) != 1:
        raise ConfigError("give one BUNDLE (or -c PATH)")
    return str(paths[0])


def _media(args: argparse.Namespace) -> "Media":
    from qvl_edge.server.fetch import Fetcher
    from qvl_edge.server.media import Media

    root = args.allowed_local_media_path
    if root is not None and not root.is_dir():
        raise ConfigError(f"--allowed-local-media-path {root} is not a folder")
    domains = frozenset(domain.lower() for domain in args.allowed_media_domains)
    for domain in domains:
        if "/" in domain or "*" in domain:
            raise ConfigError(f"--allowed-media-domains {domain}: give hosts alone, as in images.example.org")
    return Media(local_root=root, fetcher=Fetcher(domains) if domains else None)


def _bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address; uvicorn listens on it once the model is loaded."""
    try:
        version6 = ipaddress.ip_address(host).version == 6
    except ValueError:
        version6 = False
    bound = socket.socket(socket.AF_INET6 if version6 else socket.AF_INET)
    if os.name == "posix":  # Windows would let another program take the port from this one
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ConfigError(f"{host}:{port} cannot be used: {error}; take another --host or --port") from None
    return bound
