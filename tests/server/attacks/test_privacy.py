"""One caller's cache says nothing of another's."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from qvl_edge import Runtime
from qvl_edge.engine.compile_check import _error_of
from qvl_edge.engine.worker import Worker
from qvl_edge.errors import ConfigError
from qvl_edge.server.callers import read_callers
from qvl_edge.server.guard import Access

from ..harness import ScriptedWorker, Server, data_uri, picture, serving, text

pytestmark = pytest.mark.slow
SECRET = "my PIN is 4921, please keep it to yourself"


def keys(folder: Path, **tables: str) -> Path:
    """A file of callers, whose keys are their names' and `-key`."""
    file = folder / "keys.toml"
    lines = (f'[{n}]\nsha256 = "{hashlib.sha256(f"{n}-key".encode()).hexdigest()}"\n{t}\n' for n, t in tables.items())
    file.write_text("".join(lines))
    return file


def access(folder: Path, **tables: str) -> Access:
    return Access("127.0.0.1", None, callers=read_callers(keys(folder, **tables)))


def ask(server: Server, caller: str, content, **fields) -> httpx.Response:
    headers = {"authorization": f"Bearer {caller}-key", "content-type": "application/json"}
    return server.ask(content, headers=headers, max_tokens=1, temperature=0, **fields)


def cached(response: httpx.Response) -> int:
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture(scope="module")
def shared(runtime: Runtime, tmp_path_factory) -> Iterator[Server]:
    with serving(Worker(runtime), access=access(tmp_path_factory.mktemp("keys"), alice="", bob="")) as running:
        yield running


def test_nothing_of_anothers_prompt_is_recovered_by_cached_tokens(shared: Server) -> None:
    assert [cached(ask(shared, "alice", SECRET)) > 0 for _ in range(2)] == [False, True]  # her own is kept
    guesses = [f"my PIN is {digits}, please" for digits in ("4921", "4922", "1111")] + [SECRET, SECRET[:9]]
    # the second time the guess is bob's own, which his cache may say; the first one's answer depends on bob alone
    first = [cached(ask(shared, "bob", guess, cache_salt=f"probe {n}")) for n, guess in enumerate(guesses)]
    assert first == [0] * len(guesses)
    assert cached(ask(shared, "bob", SECRET)) == 0


def test_a_long_salt_is_kept_nowhere_as_it_is() -> None:
    worker = ScriptedWorker("x")
    with serving(worker) as server:
        for salt in ("a" * 1_000_000, "a" * 1_000_001, "a" * 1_000_000):
            assert server.ask("a", cache_salt=salt).status_code == 200
    salts = [request.cache_salt for request in worker.requests]
    assert salts[0] == salts[2] != salts[1] and max(map(len, salts)) <= 64


def test_whether_a_picture_was_seen_says_nothing_of_others(shared: Server, runtime: Runtime, scenes: list) -> None:
    shown = [picture(data_uri(scenes[1].image)), text("a")]
    encoded: list[int] = []
    encode = runtime.vision.encoder.encode
    runtime.vision.encoder.encode = lambda pixels: encoded.append(len(pixels)) or encode(pixels)
    try:
        for caller in ("alice", "bob", "alice", "bob"):
            assert ask(shared, caller, shown).status_code == 200
    finally:
        runtime.vision.encoder.encode = encode
    assert encoded == [1, 1]  # once for each of them


def test_a_schema_that_was_compiled_for_one_is_compiled_again_for_another(shared: Server) -> None:
    fields = {"guided_choice": ["4921", "1234"]}
    before = _error_of.cache_info().misses
    for caller in ("alice", "alice", "bob"):
        assert ask(shared, caller, "a", **fields).status_code == 200
    assert _error_of.cache_info().misses == before + 2


@pytest.mark.parametrize(("salts", "shares"), [((None, None), True), (("a", "b"), False)])
def test_sharing_is_chosen_and_a_salt_still_separates(
    runtime: Runtime, tmp_path: Path, salts: tuple, shares: bool
) -> None:
    runtime.forget()
    who = access(tmp_path, alice="", bob="")
    with serving(Worker(runtime), access=who, share_cache=True) as server:
        for caller, salt in zip(("alice", "bob"), salts, strict=True):
            last = cached(ask(server, caller, SECRET, **({"cache_salt": salt} if salt else {})))
    assert (last > 0) == shares


def test_a_salt_is_a_text_that_is_not_empty(shared: Server) -> None:
    assert ask(shared, "alice", "a", cache_salt="").status_code == 400
    assert ask(shared, "alice", "a", cache_salt=3).status_code == 400


def test_each_key_has_its_limits_and_its_name_in_the_metrics(tmp_path: Path) -> None:
    who = access(tmp_path, alice="requests_per_minute = 2", bob="", root="metrics = true")
    with serving(ScriptedWorker("x"), access=who) as server:
        assert [ask(server, "alice", "a").status_code for _ in range(3)] == [200, 200, 429]
        late = ask(server, "alice", "a")
        assert late.json()["error"]["code"] == "rate_limit_exceeded" and 1 <= int(late.headers["retry-after"]) <= 31
        assert ask(server, "bob", "a").status_code == 200 and ask(server, "eve", "a").status_code == 401
        read = {
            name: httpx.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {name}-key"})
            for name in ("alice", "root")
        }
    assert read["alice"].status_code == 403
    assert 'qvl_edge_requests_by_key_total{key="alice",status="429"} 2' in read["root"].text
    assert 'qvl_edge_tokens_by_key_total{key="alice",kind="prompt"} 10' in read["root"].text
    assert "-key" not in read["root"].text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no key"), ("a = 1", "no table"), ("[a]\n", "sha256"), ('[a]\nsha256 = "ab"', "64"), ("[a", "cannot be"),
        (f'[a]\nsha256 = "{"0" * 64}"\nkey = "x"', "known are"), (f'["a b"]\nsha256 = "{"0" * 64}"', "no table"),
        (f'[a]\nsha256 = "{"0" * 64}"\n[b]\nsha256 = "{"0" * 64}"', "two callers"),
        (f'[a]\nsha256 = "{"0" * 64}"\nrequests_per_minute = 0', "from 1 on"),
        (f'[a]\nsha256 = "{"0" * 64}"\nmetrics = 1', "true or false"),
    ],
)  # fmt: skip
def test_a_wrong_file_of_keys_says_what_is_wrong(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_callers(tmp_path / "keys")


def test_one_key_or_none_shares_as_before(runtime: Runtime, tmp_path: Path) -> None:
    assert not access(tmp_path, alice="").separate and not Access("127.0.0.1", "k").separate
    assert Access("0.0.0.0", "k", callers=read_callers(keys(tmp_path, alice=""))).separate
    with pytest.raises(ConfigError, match="one place"):
        Access("127.0.0.1", "alice-key", callers=read_callers(keys(tmp_path, alice="")))
