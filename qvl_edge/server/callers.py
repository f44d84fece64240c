"""Callers by their API keys: the names that metrics call them, and what each may ask for.

A file holds the SHA-256 of each key and never the key: it is random, so that nothing slower than a hash is needed.
"""

import hashlib
import re
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from qvl_edge.errors import ConfigError
from qvl_edge.server.refusal import RATE_LIMIT, Refusal

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Caller:
    """Who has a key. None: no limit but the server's."""

    name: str
    sha256: str
    max_concurrent_requests: int | None = None
    requests_per_minute: int | None = None
    metrics: bool = False  # whether it may read /metrics, which count everybody

    @classmethod
    def of_key(cls, name: str, key: str) -> "Caller":
        """The one who knows `key`, and may read the metrics."""
        return cls(name, hashlib.sha256(key.encode()).hexdigest(), metrics=True)


def read_callers(path: Path) -> tuple[Caller, ...]:
    """From a TOML file with a table for each caller: its `sha256`, and its limits if it has some."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # of TOML and of UTF-8 both
        raise ConfigError(f"--api-keys-file {path} cannot be read: {error}") from None
    callers = [_caller(f"--api-keys-file {path}: [{name}]", name, table) for name, table in tables.items()]
    if not callers:
        raise ConfigError(f'--api-keys-file {path} has no key; give each a table, as in [alice] and sha256 = "…"')
    shared = [digest for digest, count in Counter(caller.sha256 for caller in callers).items() if count > 1]
    if shared:
        raise ConfigError(f"--api-keys-file {path}: two callers have the key of sha256 {shared[0][:8]}…; give each one")
    return tuple(callers)


def _caller(where: str, name: str, table: object) -> Caller:
    if not _NAME.fullmatch(name) or not isinstance(table, dict):
        raise ConfigError(f"{where} is no table of a caller, whose name has up to 64 letters, digits, _, . and -")
    known = [field.name for field in fields(Caller) if field.name != "name"]
    if unknown := set(table) - set(known):
        raise ConfigError(f"{where} has {sorted(unknown)[0]!r}; known are {', '.join(known)}")
    digest = table.get("sha256")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ConfigError(f'{where} needs sha256, 64 lower-case hex digits: printf %s "$KEY" | sha256sum')
    for limit in ("max_concurrent_requests", "requests_per_minute"):
        if limit in table and (type(table[limit]) is not int or table[limit] < 1):
            raise ConfigError(f"{where} has {limit} = {table[limit]!r}; expected a whole number from 1 on")
    if not isinstance(table.get("metrics", False), bool):
        raise ConfigError(f"{where} has metrics = {table['metrics']!r}; expected true or false")
    return Caller(name, **table)


class Quotas:
    """What each caller uses of its limits."""

    def __init__(self) -> None:
        self.running: Counter[str] = Counter()
        self._left: dict[str, tuple[float, float]] = {}  # requests that may come now, and when that was so

    @contextmanager
    def place(self, caller: Caller | None) -> Iterator[None]:
        """A place among the caller's requests. Refusal 429 beyond its limits."""
        if caller is None:
            yield
            return
        most, rate, now = caller.max_concurrent_requests, caller.requests_per_minute, time.monotonic()
        if most is not None and self.running[caller.name] >= most:
            raise _beyond(f"{most} requests of the key {caller.name!r} are running, which is its limit", 1)
        if rate is not None:
            left, since = self._left.get(caller.name, (float(rate), now))
            left = min(float(rate), left + (now - since) * rate / 60)
            if left < 1:
                raise _beyond(
                    f"the key {caller.name!r} may send {rate} requests a minute", int((1 - left) * 60 / rate) + 1
                )
            self._left[caller.name] = left - 1, now
        self.running[caller.name] += 1
        try:
            yield
        finally:
            self.running[caller.name] -= 1


def _beyond(message: str, wait_s: int) -> Refusal:
    headers = {"retry-after": str(wait_s)}
    return Refusal(429, f"{message}; try again later", code="rate_limit_exceeded", kind=RATE_LIMIT, headers=headers)
