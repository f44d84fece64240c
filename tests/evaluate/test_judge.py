"""TouchStone and its judge: a stand-in on this machine answers, refuses, breaks off, and is never asked twice."""

import contextlib
import itertools
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qvl_edge.__main__ import main
from qvl_edge.evaluate.judge import Judge, JudgeError, ask_all, fingerprint, read_requests, read_verdicts
from qvl_edge.evaluate.task import Item, Prediction, QualityDataError
from qvl_edge.evaluate.touchstone import TOUCHSTONE, metrics, read_scores, requests
from qvl_edge.files import write_jsonl

from .miniature import COUNT, make

Reply = tuple[int, str]  # status and the judge's words
QUESTION = [{"role": "user", "content": "?"}]
FOREIGN = ("not JSON\n", '{"precious": 1}', '{"precious": 1}\n', "[1]\n", "3\n", "[" * 100_000 + "\n")


class Stand:
    """An OpenAI-compatible server; `reply` decides what the request with that text gets.

    `body`, if set, is what follows the head of a 200 instead, piece by piece, a Content-Length of `length` before it.
    """

    def __init__(self, reply: Callable[[str], Reply]):
        self.reply, self.seen = reply, list[tuple[str, dict[str, Any], dict[str, str]]]()
        self.body: Callable[[], Iterable[bytes]] | None = None
        self.length: int | None = None
        stand = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                stand.seen.append((self.path, body, {name.lower(): value for name, value in self.headers.items()}))
                if stand.body:
                    return self.send_pieces(stand.body(), stand.length)
                status, text = stand.reply(body["messages"][-1]["content"])
                answer = {"choices": [{"message": {"role": "assistant", "content": text}}]}
                data = json.dumps(answer).encode() if status == 200 else text.encode()
                self.send_response(status)
                self.send_header("Retry-After-Ms", "1")  # the client would wait for seconds
                if 300 <= status < 400:
                    self.send_header("Location", text)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def send_pieces(self, pieces: Iterable[bytes], length: int | None) -> None:
                self.send_response(200)
                if length is not None:
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                with contextlib.suppress(OSError):  # the client hangs up
                    for piece in pieces:
                        self.wfile.write(piece)

            def do_GET(self) -> None:  # what a client that follows a redirect would send
                stand.seen.append((self.path, {}, dict(self.headers)))
                self.send_error(404)

            def log_message(self, *_: Any) -> None:
                """No lines between pytest's."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def stand() -> Iterator[Stand]:
    """A judge that always gives the first answer 7 and the second 9."""
    running = Stand(lambda text: (200, "7 9"))
    yield running
    running.close()


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    miniature = make("touchstone", tmp_path)
    return TOUCHSTONE.read(miniature.data, miniature.images)


@pytest.fixture
def asked(items: list[Item]) -> list[dict[str, Any]]:
    return requests(items, {item.id: Prediction(item.id, f"the model's words on {item.id}") for item in items})


def test_every_answer_is_put_beside_the_reference_in_both_orders(asked, items: list[Item]) -> None:
    assert [one["id"] for one in asked] == ["0/1", "0/2", "1/1", "1/2", "2/1", "2/2"]
    for one, reference_first in zip(asked, [True, False] * COUNT, strict=True):
        text = one["messages"][1]["content"]
        reference, ours = f"{items[int(one['item'])].reference['answer']}\n", f"the model's words on {one['item']}\n"
        assert (text.index(reference) < text.index(ours)) is reference_first
        assert one["place"] == (2 if reference_first else 1)
        assert items[int(one["item"])].reference["annotation"] in text and "What is in the picture?" in text
        assert one["group"] == "Visual Recognition"


def test_only_a_judge_gives_a_score(items: list[Item]) -> None:
    assert TOUCHSTONE.score(items, {}) == []


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("7 9", (7, 9)),
        (" 8.5, 10 \nbecause", (8.5, 10)),
        ("Scores: 7 9", None),
        ("7", None),
        ("0 5", None),
        ("7 11", None),
        ("", None),
    ],
)
def test_scores_are_two_numbers_from_1_to_10_on_the_first_line(text: str, scores: tuple[float, float] | None) -> None:
    assert read_scores(text) == scores


def test_the_score_is_the_mean_of_the_models_places_and_readable_verdicts_are_counted(asked) -> None:
    verdicts = {"0/1": "10 2", "0/2": "4 10", "1/1": "10 8", "1/2": "cannot say", "2/1": "?"}
    score, readable = metrics(asked, verdicts)
    assert dict(zip(score.units, score.values, strict=True)) == {"0": 3.0, "1": 8.0}
    assert score.scale == 100 and list(score.groups) == ["Visual Recognition"] * 2
    assert dict(zip(readable.units, readable.values, strict=True)) == {
        **dict.fromkeys(("0/1", "0/2", "1/1"), 1.0),
        **dict.fromkeys(("1/2", "2/1", "2/2"), 0.0),
    }


def test_requests_go_to_the_address_given_with_the_key_and_come_back_as_verdicts(tmp_path, stand, asked) -> None:
    verdicts = ask_all(Judge(stand.address, "referee", "sesame"), asked, tmp_path / "verdicts.jsonl")
    assert verdicts == {one["id"]: "7 9" for one in asked}
    for (path, body, headers), one in zip(stand.seen, asked, strict=True):
        assert path == "/v1/chat/completions"
        assert body == {"model": "referee", "messages": one["messages"], "temperature": 0}
        assert headers["authorization"] == "Bearer sesame"


def test_nothing_that_the_environment_holds_for_openai_is_sent(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "secret")
    for key, sent in (("", None), ("sesame", "Bearer sesame")):
        Judge(stand.address, "referee", key).ask(QUESTION)
        headers = stand.seen[-1][2]
        assert headers.get("authorization") == sent and "secret" not in str(headers)


def test_a_missing_client_is_named_with_what_installs_it(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(JudgeError, match=r"needs openai; install it with: pip install 'qvl-edge\[evaluate\]'"):
        Judge(stand.address, "referee").ask(QUESTION)


def test_a_stopped_run_resumes_and_asks_nothing_twice(tmp_path: Path, stand: Stand, asked) -> None:
    path = tmp_path / "verdicts.jsonl"
    stand.reply = lambda text: (200, "7 9") if len(stand.seen) < 3 else (400, "no credit left")
    judge = Judge(stand.address, "referee")
    with pytest.raises(JudgeError, match="rejects the request, HTTP 400: no credit left"):
        ask_all(judge, asked, path)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "1/1", "requ')  # what a kill in the middle of a line leaves
    stand.reply = lambda text: (200, "1 2")
    stand.seen.clear()
    verdicts = ask_all(judge, asked, path)
    assert [body["messages"] for _, body, _ in stand.seen] == [one["messages"] for one in asked[2:]]
    assert list(verdicts.values()) == ["7 9"] * 2 + ["1 2"] * 4
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [one["id"] for one in asked]


def test_a_verdict_on_other_words_or_by_another_judge_does_not_count(tmp_path: Path, stand: Stand, asked) -> None:
    path = tmp_path / "verdicts.jsonl"
    ask_all(Judge(stand.address, "referee"), asked, path)
    changed = json.loads(json.dumps(asked))
    changed[0]["messages"][1]["content"] += "!"
    assert set(read_verdicts(path, changed, "referee")) == {one["id"] for one in asked[1:]}
    assert read_verdicts(path, asked, "another") == {}
    assert fingerprint(asked[0], "referee") != fingerprint(changed[0], "referee")


def test_a_busy_judge_is_asked_again_and_one_that_stays_busy_is_named(stand: Stand) -> None:
    stand.reply = lambda text: (429, "slow down") if len(stand.seen) < 3 else (200, "5 5")
    judge = Judge(stand.address, "referee")
    assert judge.ask([{"role": "user", "content": "?"}]) == "5 5"
    assert len(stand.seen) == 3
    stand.reply = lambda text: (503, "down")
    with pytest.raises(JudgeError, match="in 5 attempts, the last time HTTP 503: down; .*run the same command again"):
        judge.ask([{"role": "user", "content": "?"}])


def test_a_closed_port_is_named() -> None:
    gone = Stand(lambda text: (200, ""))
    gone.close()
    with pytest.raises(JudgeError, match="in 2 attempts, the last time .*refused"):
        Judge(gone.address, "referee", retries=1).ask([{"role": "user", "content": "?"}])


@pytest.mark.parametrize("status", [302, 307])
def test_the_key_follows_no_redirect(stand: Stand, status: int) -> None:
    other = Stand(lambda text: (200, "9 9"))
    stand.reply = lambda text: (status, other.address + "/chat/completions")
    try:
        with pytest.raises(JudgeError, match=f"rejects the request, HTTP {status}"):
            Judge(stand.address, "referee", "sesame").ask([{"role": "user", "content": "?"}])
        assert other.seen == []
    finally:
        other.close()


def test_a_key_is_not_sent_unencrypted_to_another_machine() -> None:
    with pytest.raises(JudgeError, match="unencrypted"):
        Judge("http://judge.example/v1", "referee", "sesame")
    assert Judge("http://judge.example/v1", "referee").key == ""
    for address in ("judge.example/v1", "ftp://judge.example", "https://"):
        with pytest.raises(JudgeError, match="is not an address like"):
            Judge(address, "referee")


def test_the_key_goes_past_a_proxy_that_could_read_it(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Stand(lambda text: (200, "9 9"))
    monkeypatch.setenv("http_proxy", proxy.address)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    try:
        assert Judge(stand.address, "referee", "sesame").ask(QUESTION) == "7 9"
        assert proxy.seen == []
    finally:
        proxy.close()


@pytest.mark.parametrize("key", ["sesame\r", "ses\name", "s\u00e9same", "\u201csesame\u201d", "ses\x7fame"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(JudgeError, match=f"of the key's {len(key)} characters are not printable ASCII") as error:
        Judge("https://judge.example/v1", "referee", key)
    assert "same" not in str(error.value)
    assert "sesame" not in repr(Judge("https://judge.example/v1", "referee", "sesame"))


@pytest.mark.parametrize(
    "address", ["http://[::1", "http://127.0.0.1:port/v1", "http://127.0.0.1/a b", "http://h\u00e9/"]
)
def test_an_address_that_cannot_be_read_is_refused(address: str) -> None:
    with pytest.raises(JudgeError, match="is not an address like"):
        Judge(address, "referee")


@pytest.mark.parametrize(
    "body", ["not JSON", '{"choices": []}', '{"choices": [{"message": {"content": ["7 9"]}}]}', "[" * 200_000]
)
def test_an_answer_in_another_format_is_named(stand: Stand, body: str) -> None:
    stand.reply = lambda text: (201, body)  # 201: the stand sends the words as the whole body
    with pytest.raises(JudgeError, match="does not answer as OpenAI's chat completions do"):
        Judge(stand.address, "referee").ask(QUESTION)


@pytest.mark.parametrize(
    ("message", "verdict"),
    [
        ('{"content": null}', ""),
        ('{"content": null, "refusal": "I will not."}', "I will not."),
        ('{"content": "8 9 \\ud800"}', "8 9 ?"),
    ],
)
def test_a_strange_verdict_is_kept_and_the_run_goes_on(
    tmp_path: Path, stand: Stand, asked, message: str, verdict: str
) -> None:
    strange = '{"choices": [{"message": ' + message + "}]}"
    stand.reply = lambda text: (201, strange) if len(stand.seen) == 1 else (200, "7 9")
    path = tmp_path / "verdicts.jsonl"
    verdicts = ask_all(Judge(stand.address, "referee"), asked, path)
    assert list(verdicts.values()) == [verdict] + ["7 9"] * 5
    assert read_verdicts(path, asked, "referee") == verdicts
    assert metrics(asked, verdicts)[1].values == [0.0] + [1.0] * 5


def test_of_an_endless_answer_a_little_is_read(stand: Stand) -> None:
    sent = []

    def body() -> Iterator[bytes]:
        for _ in range(64):
            sent.append(1 << 20)
            yield b" " * (1 << 20)

    stand.body = body
    with pytest.raises(JudgeError, match=f"the first of {4 << 20} bytes read"):
        Judge(stand.address, "referee").ask(QUESTION)
    assert sum(sent) < 64 << 20  # the client hung up; what the sockets' buffers hold is sent besides


def test_an_answer_that_never_ends_byte_by_byte_is_given_up(stand: Stand) -> None:
    gone = threading.Event()

    def body() -> Iterator[bytes]:
        while not gone.wait(0.02):
            yield b" "

    stand.body = body
    try:
        with pytest.raises(JudgeError, match=r"did not end its answer in 0\.1 s; the verdicts so far are kept"):
            Judge(stand.address, "referee", timeout_s=0.1).ask(QUESTION)
    finally:
        gone.set()


def test_an_answer_that_breaks_off_is_asked_for_again(stand: Stand) -> None:
    whole = b'{"choices": [{"message": {"content": "7 9"}}]}'
    stand.length = len(whole)
    stand.body = lambda: [whole if len(stand.seen) > 1 else whole[:20]]
    assert Judge(stand.address, "referee").ask(QUESTION) == "7 9"
    assert len(stand.seen) == 2


def test_words_with_a_line_separator_are_one_request(tmp_path: Path, items: list[Item]) -> None:
    strange = "first\u2028second\u0085third\x1dfourth"
    made = requests(items, {item.id: Prediction(item.id, strange) for item in items})
    write_jsonl(tmp_path / "requests.jsonl", made)
    assert read_requests(tmp_path / "requests.jsonl") == made


def test_half_a_character_in_a_request_can_be_asked_about(tmp_path: Path, stand: Stand, asked) -> None:
    one = {**asked[0], "messages": [{"role": "user", "content": "\ud800"}]}
    assert ask_all(Judge(stand.address, "referee"), [one], tmp_path / "verdicts.jsonl") == {"0/1": "7 9"}


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path, stand: Stand, asked) -> None:
    path = tmp_path / "verdicts.jsonl"
    ask_all(Judge(stand.address, "referee"), asked, path)
    path.write_bytes(path.read_bytes()[:-1])  # as an editor may leave it
    stand.seen.clear()
    assert len(ask_all(Judge(stand.address, "referee"), asked, path)) == 6
    assert stand.seen == []


@pytest.mark.parametrize(
    ("ours", "text"),  # verdicts before the text; after one, half a line is what a killed run leaves
    [
        (0, "half a line"),
        *itertools.product((0, 1), FOREIGN),
    ],
)
def test_a_file_that_holds_something_else_than_verdicts_is_left_alone(
    tmp_path: Path, stand: Stand, asked, ours: int, text: str
) -> None:
    path = tmp_path / "verdicts.jsonl"
    ask_all(Judge(stand.address, "referee"), asked[:ours], path)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
    before = path.read_bytes()
    stand.seen.clear()
    with pytest.raises(QualityDataError, match="verdicts.jsonl is not a file of verdicts, name another one"):
        ask_all(Judge(stand.address, "referee"), asked, path)
    with pytest.raises(QualityDataError, match="verdicts.jsonl is not a file of verdicts, name another one"):
        read_verdicts(path, asked, "referee")
    assert path.read_bytes() == before and stand.seen == []


def test_the_command_asks_only_where_it_is_told_to(
    tmp_path: Path, stand: Stand, asked, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [str(tmp_path / "requests.jsonl"), str(tmp_path / "verdicts.jsonl")]
    write_jsonl(tmp_path / "requests.jsonl", asked)
    assert read_requests(tmp_path / "requests.jsonl") == asked
    monkeypatch.setenv("MY_KEY", "sesame")
    command = ["judge", *files, "--model", "referee"]
    assert main(command) == 1
    assert "has no verdict of referee on these requests; add --judge URL to ask for them" in capsys.readouterr().err
    assert stand.seen == []
    assert main([*command, "--judge", stand.address, "--key-env", "MY_KEY"]) == 0
    first = capsys.readouterr().out
    assert stand.seen[0][2]["authorization"] == "Bearer sesame"
    # 9 where the reference comes first, 7 where the model does
    assert first.startswith("6 of 6 verdicts\nTouchStone score 800.0 [")
    assert main(command) == 0
    assert capsys.readouterr().out == first and len(stand.seen) == len(asked)


def test_the_command_makes_the_folder_and_ends_with_one_line_where_it_cannot_go_on(
    tmp_path: Path, stand: Stand, asked, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "requests.jsonl"
    write_jsonl(path, asked)
    monkeypatch.setenv("JUDGE_API_KEY", "sesame\r\n")  # as from a file with Windows' ends of lines
    ask = ["--model", "referee", "--judge", stand.address]
    assert main(["judge", str(path), str(tmp_path / "new" / "folder" / "verdicts.jsonl"), *ask]) == 0
    assert stand.seen[0][2]["authorization"] == "Bearer sesame"
    shutil.copy(path, tmp_path / "copy.jsonl")
    for verdicts, message in (
        (tmp_path / "copy.jsonl", "is not a file of verdicts"),
        (tmp_path / "new", "Is a directory"),
        (path / "verdicts.jsonl", "exists|Not a directory"),
    ):
        capsys.readouterr()
        assert main(["judge", str(path), str(verdicts), *ask]) == 1
        *_, last = capsys.readouterr().err.splitlines()
        assert re.match(f"qvl-edge judge: .*({message})", last)
    monkeypatch.setenv("JUDGE_API_KEY", "s\u00e9same")
    assert main(["judge", str(path), str(tmp_path / "verdicts.jsonl"), *ask]) == 1
    assert capsys.readouterr().err.startswith("qvl-edge judge: 1 of the key's 6 characters")
    assert read_requests(tmp_path / "copy.jsonl") == asked


def test_a_file_that_holds_no_requests_is_named(tmp_path: Path, asked) -> None:
    path = tmp_path / "requests.jsonl"
    strange = [json.dumps({**asked[0], **change}) for change in ({"place": 3}, {"item": [1]}, {"messages": None})]
    for text in ("", "{}\n", *strange):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(QualityDataError, match="requests.jsonl does not hold the requests"):
            read_requests(path)
    for text in ("[1]\n", "no JSON\n", "[" * 100_000):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(QualityDataError, match="requests.jsonl, line 1 (holds a list|is not valid JSON)"):
            read_requests(path)
    with pytest.raises(QualityDataError, match="none.jsonl is missing"):
        read_requests(tmp_path / "none.jsonl")
