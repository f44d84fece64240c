"""qvl-edge serve as a user types it, and the API's own description against the server."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from qvl_edge.__main__ import main
from qvl_edge.engine.worker import Worker
from qvl_edge.runtime import Runtime
from qvl_edge.server.openapi import document
from qvl_edge.server.protocol import Limits, request_model

from .conftest import CHECKPOINT
from .harness import MODEL, ScriptedWorker, Server, data_uri, picture, serving

pytestmark = pytest.mark.slow

SMALL = str(CHECKPOINT)


@pytest.mark.slow
def test_serve_answers_logs_no_content_and_stops_when_told(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "QVL_EDGE_API_KEY": "from-the-environment"}
    arguments = [
        "serve",
        "-c",
        SMALL,
        "--cpu-only",
        "--server-port",
        "0",
        "--max-model-len",
        "300",
        "--max-new-tokens",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "qvl_edge", *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        lines = []
        while not (found := re.search(r"API (http://\S+)/v1", lines[-1] if lines else "")):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        server = Server(found[1], None, "from-the-environment")
        while "startup complete" not in lines[-1]:
            lines.append(process.stderr.readline())
        secret = "a-secret-of-the-caller"
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{server.url}/v1/models?{secret}").status_code == 401
        (model,) = server.client.models.list().data
        assert model.id == "checkpoint" and model.max_model_len == 300
        said = server.client.chat.completions.create(model="checkpoint", messages=[{"role": "user", "content": secret}])
        assert said.usage.completion_tokens == 2 and said.choices[0].finish_reason == "length"
    finally:
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=30)[1]
    assert "Application shutdown complete" in rest
    assert secret not in "".join(lines) + rest and "from-the-environment" not in "".join(lines) + rest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([SMALL, "--host", "0.0.0.0"], "QVL_EDGE_API_KEY"),
        ([SMALL, "--server-name", "example.org"], "QVL_EDGE_API_KEY"),
        ([SMALL, "--api-key", ""], "the API key is empty"),
        ([], "give one BUNDLE"),
        ([SMALL, "-c", SMALL], "give one BUNDLE"),
        ([SMALL, "--allowed-local-media-path", "no/such"], "is not a folder"),
        ([SMALL, "--allowed-media-domains", "https://a.example/"], "give hosts alone"),
        ([SMALL, "--port", "99999"], "cannot be used"),
        (["no/such/folder", "--port", "0"], "neither a local folder"),
    ],
)
def test_what_cannot_be_served_is_one_clear_line(arguments, words: str, capsys, monkeypatch) -> None:
    monkeypatch.delenv("QVL_EDGE_API_KEY", raising=False)
    assert main(["serve", *arguments]) == 1
    said = capsys.readouterr()
    assert words in said.err and "Traceback" not in said.err


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", SMALL, "--port", str(taken.getsockname()[1])]) == 1
    said = capsys.readouterr().err
    assert "take another --host or --port" in said and "loaded" not in said


REQUEST = request_model(MODEL, Limits(messages=9, n=3))


def described() -> dict[str, Any]:
    """The properties of a chat request in the OpenAPI document."""
    schemas = document(REQUEST, keyed=True)["components"]["schemas"]
    return schemas["ChatCompletionRequest"]["properties"]


def test_the_description_names_exactly_the_fields_that_are_read() -> None:
    assert described().keys() == {
        *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "stop"),
        *("repetition_penalty", "n", "seed", "stream", "stream_options", "logprobs", "top_logprobs", "response_format"),
        *("presence_penalty", "frequency_penalty", "min_p", "logit_bias", "min_tokens", "ignore_eos", "stop_token_ids"),
        *("structured_outputs", "guided_json", "guided_regex", "guided_choice"),
        *("continue_final_message", "add_generation_prompt", "cache_salt"),
        *REQUEST.neutral,
        *REQUEST.ignored,
    }


def test_the_description_has_the_ranges_of_the_generation_options_and_the_servers_limits() -> None:
    int32, int64 = (1 << 31) - 1, 1 << 63
    found = described()
    ranges = {
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": int32},
        "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": int32},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"type": "integer", "minimum": 0, "maximum": int32},
        "repetition_penalty": {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
        "seed": {"type": "integer", "minimum": -int64, "maximum": int64 - 1},
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
        "n": {"type": "integer", "minimum": 1, "maximum": 3},
    }
    for name, expected in ranges.items():
        assert found[name]["anyOf"] == [expected, {"type": "null"}], name
    text = {"type": "string", "minLength": 1}
    assert found["stop"]["anyOf"] == [text, {"type": "array", "items": text, "maxItems": 4}, {"type": "null"}]
    assert found["model"]["const"] == MODEL and found["messages"]["maxItems"] == 9
    assert "the likeliest token" not in found["temperature"]["description"] and found["top_k"]["description"]


@pytest.mark.slow
def test_the_description_holds_when_the_api_is_fuzzed(tmp_path: Path) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis.configuration import set_hypothesis_home_dir
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    set_hypothesis_home_dir(tmp_path)  # else it leaves a folder where the tests are run
    engine = ScriptedWorker("<ref>a</ref><box>(0,0),(9,9)</box>")
    settings = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
    paths = set()
    with serving(engine, key="sesame") as server:
        headers = {"Authorization": "Bearer sesame"}
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
        for result in schema.get_all_operations():
            operation = result.ok()

            @hypothesis.given(case=operation.as_strategy())
            @settings
            def fuzz(case) -> None:
                paths.add(case.operation.path)
                # that turns alternate and images can be read is more than a schema says
                case.call_and_validate(headers=headers, excluded_checks=[positive_data_acceptance])

            fuzz()
        good = {
            "model": MODEL,
            "messages": [{"role": "user", "content": [picture(data_uri(Image.new("RGB", (2, 2))))]}],
        }
        schema["/v1/chat/completions"]["POST"].Case(body=good).call_and_validate(headers=headers)
        described = set(httpx.get(f"{server.url}/openapi.json", headers=headers).json()["paths"])
    assert engine.requests and paths == described - {"/openapi.json"}  # schemathesis leaves its own source out


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.slow
def test_the_curl_lines_of_the_docs_work_as_they_stand(runtime: Runtime, tmp_path: Path) -> None:
    docs = (Path(__file__).parents[2] / "docs/server.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```sh\n(.*?)^```$", docs, re.S | re.M)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "street.jpg")
    with serving(Worker(runtime)) as server:
        script = block.replace("http://127.0.0.1:8000", server.url).replace("BUNDLE", MODEL)
        said = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert f'"id":"{MODEL}"' in said.stdout.replace(" ", "")
    assert '"finish_reason"' in said.stdout and said.stdout.rstrip().endswith("data: [DONE]")
    assert '"error"' not in said.stdout


@pytest.mark.parametrize("package", ["pydantic", "starlette", "uvicorn", "h11"])
@pytest.mark.slow
def test_without_the_extra_serve_says_what_is_missing(package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\nfrom qvl_edge.__main__ import main; main(['serve', {SMALL!r}])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stderr
    assert f"the server needs {package}" in said and "pip install 'qvl-edge[serve]'" in said
