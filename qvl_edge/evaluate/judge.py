"""A judge's verdicts: sends the requests of a JSON lines file to a server with OpenAI's API, and keeps what comes.

    python -m qvl_edge.evaluate.judge REQUESTS.jsonl VERDICTS.jsonl --judge https://HOST/v1 --model NAME

REQUESTS has {"id", "messages", …} a line, as qvl_edge.evaluate.tasks.touchstone.requests makes them. Each verdict is
written as soon as it is there; started again, only what is missing is asked for. A verdict belongs to its request's
very text and to the judge's name: after another --model, or other answers, it is asked for anew. Nothing is ever sent
without --judge; without it the verdicts that are there are scored. The key is read from an environment variable and
goes to that address alone, through no redirect, and unencrypted only to this machine. An http address is asked
directly, whatever proxy the environment names: a proxy would read the key.
"""

import argparse
import hashlib
import http.client
import json
import math
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qvl_edge.errors import QvlError
from qvl_edge.evaluate.intervals import mean_of
from qvl_edge.evaluate.task import QualityDataError
from qvl_edge.evaluate.tasks.touchstone import metrics
from qvl_edge.files import replacing

KEY = "JUDGE_API_KEY"  # the environment variable
_TRIES = 5
_WAIT_S = 2.0  # before the second try; twice as long before each further one
_TIMEOUT_S = 300.0  # of a try, to the last byte of the answer
_LONGEST = 4 << 20  # bytes of an answer that are read; a verdict has some hundred
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class JudgeError(QvlError, OSError):
    """The judge cannot be asked, or does not answer."""


class _AsItCame(urllib.request.HTTPErrorProcessor):
    """Hands on every answer whatever its status: no redirect is followed, so no header travels to another host."""

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        return response

    https_response = http_response


@dataclass(frozen=True)
class Judge:
    """A model behind an address like https://HOST/v1; `key` may be empty. JudgeError if one of them cannot be used."""

    address: str
    model: str
    key: str = field(default="", repr=False)
    wait_s: float = _WAIT_S
    timeout_s: float = _TIMEOUT_S

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.address)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a bracket that stays open, a port that is no number
            sound = False
        if not sound or not _printable(self.address) or " " in self.address:
            raise JudgeError(f"--judge {self.address!r} is no address like https://HOST/v1")
        if not _printable(self.key):
            bad = sum(not _printable(one) for one in self.key)
            raise JudgeError(
                f"{bad} of the key's {len(self.key)} characters are not printable ASCII, and no header can carry them; "
                "copy the key again"
            )
        if self.key and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise JudgeError(f"--judge {self.address} would carry the key unencrypted; use https, or unset the key")

    def ask(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The judge's answer, at temperature 0; what it says instead, or "", where it would not answer.

        Busy servers and broken lines are tried again, requests that the server refuses are not.
        """
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        request = urllib.request.Request(self.address.rstrip("/") + "/chat/completions", body, headers)
        direct = [urllib.request.ProxyHandler({})] if urlsplit(self.address).scheme == "http" else []
        opener = urllib.request.build_opener(_AsItCame, *direct)
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(self.wait_s * 2 ** (attempt - 1))
            try:
                deadline = time.monotonic() + self.timeout_s
                with opener.open(request, timeout=self.timeout_s) as response:
                    answer = _body(response, deadline)
            except (OSError, http.client.HTTPException) as error:
                what = str(getattr(error, "reason", None) or error)
                continue
            if 200 <= response.status < 300:
                return _content(answer, self.address)
            what = f"HTTP {response.status}: {answer[:300].decode(errors='replace')}"
            if response.status != 429 and response.status < 500:
                raise JudgeError(f"{self.address} refuses the request, {what}")
        raise JudgeError(
            f"{self.address} gave no answer in {_TRIES} tries, the last time {what}; the verdicts so far are kept, "
            "run the same command again"
        )


def _printable(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _body(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The first _LONGEST bytes of an answer; a longer one is cut, and is no JSON then."""
    body = bytearray()
    while len(body) < _LONGEST and (piece := response.read1(min(1 << 16, _LONGEST - len(body)))):
        body += piece
        if time.monotonic() > deadline:  # the socket's own limit starts anew with every byte
            raise TimeoutError(f"the answer was not there in time, {len(body)} bytes of it were")
    if len(body) < _LONGEST and response.length:
        raise http.client.IncompleteRead(bytes(body), response.length)
    return bytes(body)


def _content(body: bytes, address: str) -> str:
    try:
        message = json.loads(body)["choices"][0]["message"]
        content = message["content"]
        if content is None:  # a refusal, or an answer that a filter took away: a verdict that cannot be read
            content = message.get("refusal") or ""
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        content = None
    if not isinstance(content, str):
        raise JudgeError(
            f"{address} does not answer as OpenAI's chat completions do, the first of {len(body)} bytes read are "
            f"{body[:200]!r}"
        )
    return content.encode("utf-8", "replace").decode()  # JSON can hold half a character, UTF-8 cannot


def write_requests(path: Path, requests: Sequence[Mapping[str, Any]]) -> None:
    """One request a line, written beside and renamed."""
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in requests), encoding="utf-8")


def read_requests(path: Path) -> list[dict[str, Any]]:
    """The requests of a file; QualityDataError if it is missing or a line is none."""
    try:  # at "\n" alone: JSON leaves U+2028 and other ends of lines in a model's words as they are
        requests = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise QualityDataError(f"{path} holds no requests: {error}") from None
    if not requests or not all(map(_is_request, requests)):
        raise QualityDataError(f"{path} holds no requests; write_requests makes such a file")
    return requests


def _is_request(one: Any) -> bool:
    return _has(one, id=str, messages=list, item=str, group=str, place=int) and one["place"] in (1, 2)


def _has(value: Any, **fields: type) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in fields.items())


def fingerprint(request: Mapping[str, Any], model: str) -> str:
    """What a verdict belongs to: the judge's name and every word of the request."""
    words = json.dumps([model, request["messages"]], ensure_ascii=False)
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()


def ask_all(
    judge: Judge,
    requests: Sequence[Mapping[str, Any]],
    path: Path,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Verdicts by request id: those that `path` holds, and the missing ones asked for and appended to it.

    QualityDataError, and nothing is written, if the file is there and holds something else.
    """
    found = _read_lines(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:  # without the half line that a killed run may have left
        partial.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found), encoding="utf-8")
    done = {one["request"] for one in found}
    missing = [one for one in requests if fingerprint(one, judge.model) not in done]
    with path.open("a", encoding="utf-8") as file:
        for number, request in enumerate(missing, len(requests) - len(missing)):
            tick(number, len(requests))
            verdict = judge.ask(request["messages"])
            line = {
                "id": request["id"],
                "request": fingerprint(request, judge.model),
                "model": judge.model,
                "verdict": verdict,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    tick(len(requests), len(requests))
    return read_verdicts(path, requests, judge.model)


def read_verdicts(path: Path, requests: Sequence[Mapping[str, Any]], model: str) -> dict[str, str]:
    """Verdicts by request id as far as `path` has them; QualityDataError if it holds something else."""
    verdicts = {one["request"]: one["verdict"] for one in _read_lines(path)}
    prints = {one["id"]: fingerprint(one, model) for one in requests}
    return {identity: verdicts[print_] for identity, print_ in prints.items() if print_ in verdicts}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The verdicts of a file, none if it is missing. A last line that a killed run left half is left out, but only
    after a verdict: a file with half a line and nothing else may be anybody's."""
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    try:
        found = [json.loads(line) for line in lines if line.strip()]
        if last.strip():
            try:
                found.append(json.loads(last))
            except ValueError:
                if not found:
                    raise
    except (ValueError, RecursionError) as error:
        raise QualityDataError(f"{path} holds no verdicts: {error}; name another file") from None
    if not all(_has(one, request=str, verdict=str) for one in found):
        raise QualityDataError(f"{path} holds something else than verdicts; name another file")
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m qvl_edge.evaluate.judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("requests", type=Path, metavar="REQUESTS.jsonl")
    parser.add_argument("verdicts", type=Path, metavar="VERDICTS.jsonl")
    parser.add_argument("--judge", metavar="URL", help="address of the judge's API, like https://HOST/v1")
    parser.add_argument("--model", required=True, help="the judge's name there")
    parser.add_argument("--key-env", default=KEY, metavar="NAME", help=f"environment variable with the key ({KEY})")
    args = parser.parse_args(arguments)
    try:
        requests = read_requests(args.requests)
        if args.judge:
            judge = Judge(args.judge, args.model, os.environ.get(args.key_env, "").strip())
            verdicts = ask_all(judge, requests, args.verdicts, _progress)
        else:
            verdicts = read_verdicts(args.verdicts, requests, args.model)
    except (QvlError, OSError) as error:
        sys.exit(f"error: {error}")
    if not verdicts:
        sys.exit(f"error: {args.verdicts} has no verdict of {args.model} on these requests; --judge URL asks for them")
    print(f"{len(verdicts)} of {len(requests)} verdicts")
    for metric in metrics(requests, verdicts):
        estimate = mean_of(metric.values).scaled(metric.scale)
        spread = "" if math.isnan(estimate.low) else f" [{estimate.low:.1f}, {estimate.high:.1f}]"
        print(f"{metric.name} " + ("–" if math.isnan(estimate.value) else f"{estimate.value:.1f}{spread}"))


def _progress(done: int, total: int) -> None:
    print(f"\r{done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
