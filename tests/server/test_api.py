"""OpenAI's own client, unmodified, against the small model; and each kind of error in OpenAI's shape."""

import asyncio
import json
import socket
import threading

import httpx
import openai
import pytest
from PIL import Image

from qvl_edge.answer import TokenLogprob
from qvl_edge.demo.scenes import Scene
from qvl_edge.engine.request import Piece
from qvl_edge.engine.worker import Worker
from qvl_edge.errors import EngineFailed, OutOfMemory, PromptError, QueueFull, TimeLimit
from qvl_edge.runtime import Runtime
from qvl_edge.server.protocol import Limits

from .harness import MODEL, ScriptedWorker, Server, data_uri, for_ever, picture, serving, text, until

pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0}


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


def test_text_gives_the_runtimes_own_answer(server: Server, runtime: Runtime) -> None:
    said = server.client.chat.completions.create(model=MODEL, messages=user("hello"), **GREEDY)
    answer = runtime.answer("hello", do_sample=False)
    assert said.choices[0].message.content == answer.text
    assert said.choices[0].finish_reason == answer.finish_reason
    assert said.usage.prompt_tokens == answer.usage.prompt_tokens
    assert said.usage.completion_tokens == answer.usage.completion_tokens
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    assert 0 <= said.usage.prompt_tokens_details.cached_tokens < said.usage.prompt_tokens
    assert said.id.startswith("chatcmpl-") and said.object == "chat.completion" and said.model == MODEL


@pytest.mark.parametrize("text_first", [False, True])
def test_one_image_gives_the_box_in_its_pixels(server: Server, scenes: list[Scene], text_first: bool) -> None:
    image = scenes[0].image.resize((900, 600))
    content = [picture(data_uri(image)), text("Find the red diamond.")]
    content = content[::-1] if text_first else content
    said = server.client.chat.completions.create(model=MODEL, messages=user(content), **GREEDY)
    (target,) = (shape for shape in scenes[0].shapes if shape.name("en") == "red diamond")
    (box,) = said.choices[0].message.boxes
    assert box["label"] == "red diamond" and box["corners"] == list(target.box) and box["image"] == 0
    x1, y1, x2, y2 = target.box
    assert box["pixels"] == [int(x1 / 1000 * 900), int(y1 / 1000 * 600), int(x2 / 1000 * 900), int(y2 / 1000 * 600)]


def test_three_images_a_system_turn_and_a_history_reach_the_model_in_order(
    server: Server, runtime: Runtime, scenes: list[Scene]
) -> None:
    first, second, third = (scene.image for scene in scenes)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [picture(data_uri(first)), picture(data_uri(second)), text("How many shapes?")]},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": [picture(data_uri(third)), text("Find the black circle.")]},
    ]
    said = server.client.chat.completions.create(model=MODEL, messages=messages, **GREEDY)
    history = [([{"image": first}, {"image": second}, {"text": "How many shapes?"}], "2")]
    query = [{"image": third}, {"text": "Find the black circle."}]
    answer = runtime.answer(query, history, "Be brief.", do_sample=False)
    assert said.choices[0].message.content == answer.text
    assert said.usage.prompt_tokens == answer.usage.prompt_tokens > 3 * 256
    assert [box["image"] for box in said.choices[0].message.boxes] == [2]


def test_a_box_of_a_long_conversation_counts_the_images_that_were_sent(scenes: list[Scene]) -> None:
    # the engine says that one image of two fitted into its window
    engine = ScriptedWorker("<ref>a</ref><box>(0,0),(500,500)</box>", forgets=1)
    image = data_uri(scenes[0].image)
    messages = [*user([picture(image)]), {"role": "assistant", "content": "x"}, *user([picture(image), text("a")])]
    with serving(engine) as server:
        said = server.post({"model": MODEL, "messages": messages}).json()
    assert [(box["image"], box["pixels"]) for box in said["choices"][0]["message"]["boxes"]] == [(1, [0, 0, 50, 25])]


def test_a_stream_carries_role_text_boxes_and_usage(server: Server, scenes: list[Scene]) -> None:
    content = [picture(data_uri(scenes[0].image)), text("Describe the picture with boxes.")]
    whole = server.client.chat.completions.create(model=MODEL, messages=user(content), **GREEDY)
    chunks = list(
        server.client.chat.completions.create(
            model=MODEL, messages=user(content), stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    *said, last, usage = chunks
    assert said[0].choices[0].delta.role == "assistant" and len(said) > 10
    assert "".join(chunk.choices[0].delta.content for chunk in said) == whole.choices[0].message.content
    assert last.choices[0].finish_reason == "stop" and last.choices[0].delta.content is None
    assert last.choices[0].delta.boxes == whole.choices[0].message.boxes and len(last.choices[0].delta.boxes) == 2
    assert usage.choices == [] and usage.usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1


def test_a_stream_is_server_sent_events_that_end_with_done(server: Server) -> None:
    response = server.ask("hello", stream=True, max_tokens=3)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event[6:]) for event in events[:-2])


def test_a_seed_repeats_and_draws_differ_by_it(server: Server) -> None:
    def drawn(**fields):
        said = server.client.chat.completions.create(
            model=MODEL, messages=user("hello"), temperature=2, top_p=1, max_tokens=12, **fields
        )
        return [choice.message.content for choice in said.choices], said.usage

    three, usage = drawn(seed=7, n=3)
    assert len(set(three)) == 3
    assert [drawn(seed=7 + index)[0][0] for index in range(3)] == three
    assert usage.completion_tokens > 12 and usage.prompt_tokens == drawn(seed=7)[1].prompt_tokens


def test_draws_of_a_stream_carry_their_index(server: Server) -> None:
    chunks = server.client.chat.completions.create(
        model=MODEL, messages=user("hello"), n=2, stream=True, max_tokens=4, **GREEDY
    )
    said = {0: "", 1: ""}
    for chunk in chunks:
        said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert said[0] == said[1] != ""


def test_stop_strings_and_max_tokens_end_an_answer(server: Server, scenes: list[Scene]) -> None:
    content = [picture(data_uri(scenes[0].image)), text("Find the red diamond.")]
    create = server.client.chat.completions.create
    for stop in ("</ref>", ["</ref>", "zzz"]):
        cut = create(model=MODEL, messages=user(content), stop=stop, **GREEDY)
        assert cut.choices[0].message.content == "<ref>red diamond" and cut.choices[0].finish_reason == "stop"
    for name in ("max_tokens", "max_completion_tokens"):
        short = create(model=MODEL, messages=user(content), **{name: 2}, **GREEDY)
        assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2


def test_sampling_options_reach_the_engine_under_their_names() -> None:
    engine = ScriptedWorker("x")
    with serving(engine) as server:
        more = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True}
        options = {"temperature": 0.5, "top_p": 0.25, "seed": 4, "stop": ["."], "logit_bias": {"5": -100}}
        options |= {"presence_penalty": 0.5, "frequency_penalty": -0.5, "extra_body": more | {"stop_token_ids": [9]}}
        server.client.chat.completions.create(model=MODEL, messages=user("a"), max_tokens=5, **options)
        server.client.chat.completions.create(model=MODEL, messages=user("a"), temperature=0)
    assert engine.requests[0].generation == {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "seed": 4,
        "stop": ["."],
        "logit_bias": {"5": -100},
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "min_new_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [9],
    }
    assert engine.requests[1].generation == {"temperature": 0.0}
    assert [message.role for message in engine.requests[1].messages] == ["user"]


def test_messages_become_turns() -> None:
    engine = ScriptedWorker("x")
    messages = [
        {"role": "developer", "content": [text("a"), text("b")]},
        {"role": "user", "content": "one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    with serving(engine) as server:
        said = server.post({"model": MODEL, "messages": messages})
        assert server.metric("qvl_edge_cached_tokens_total") == 3
    assert said.json()["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 1,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    (request,) = engine.requests
    assert [(message.role, message.content) for message in request.messages] == [
        ("system", "ab"),
        ("user", [text_element("one"), text_element("\n"), text_element("two")]),
        ("assistant", "three"),
        ("user", [text_element("four")]),
    ]


def text_element(words: str) -> dict[str, str]:
    return {"text": words}


def test_the_model_is_listed_and_found_by_name(server: Server) -> None:
    (model,) = server.client.models.list().data
    assert model.id == MODEL and model.max_model_len == 8192
    assert server.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-3.5-turbo")


def test_every_name_is_listed_found_and_answered_also_one_with_slashes() -> None:
    names = ["Qwen/Qwen-VL-Chat", "small", "a/b/c"]
    with serving(ScriptedWorker("x"), model=names[0], aliases=tuple(names[1:]), fingerprint="fp_1") as server:
        assert [model.id for model in server.client.models.list().data] == names
        for name in names:
            assert server.client.models.retrieve(name).id == name
            assert httpx.get(f"{server.url}/v1/models/{name}").json()["id"] == name
            said = server.client.chat.completions.create(model=name, messages=user("a"))
            assert (said.model, said.system_fingerprint) == (name, "fp_1")
        with pytest.raises(openai.NotFoundError, match="Qwen/Qwen-VL-Chat, small, a/b/c"):
            server.client.models.retrieve("Qwen/other")
        with pytest.raises(openai.NotFoundError, match="Qwen/Qwen-VL-Chat"):
            server.client.chat.completions.create(model="other", messages=user("a"))
        (chunk, *_) = server.client.chat.completions.create(model="small", messages=user("a"), stream=True)
        assert chunk.system_fingerprint == "fp_1"


def test_an_answer_goes_back_in_as_history_as_clients_dump_it(server: Server, runtime: Runtime, scenes: list) -> None:
    content = [picture(data_uri(scenes[0].image)), text("Find the red diamond.")]
    create = server.client.chat.completions.create
    message = create(model=MODEL, messages=user(content), **GREEDY).choices[0].message
    litellms = {
        "provider_specific_fields": {"refusal": None},
        "annotations": [],
        "reasoning_content": None,
        "images": [],
    }
    expected = None
    for dumped in (
        {"role": "assistant", "content": message.content},
        message.model_dump(),
        message.model_dump(exclude_none=True),
        message.model_dump() | litellms | {"tool_calls": [], "function_call": None, "name": None},
    ):
        said = create(model=MODEL, messages=[*user(content), dumped, *user("Describe the picture.")], **GREEDY)
        expected = expected or said.choices[0].message.content
        assert said.choices[0].message.content == expected


def test_an_assistants_message_is_continued_from_its_last_character(server: Server, scenes: list[Scene]) -> None:
    content = [picture(data_uri(scenes[0].image)), text("Find the red diamond.")]
    create = server.client.chat.completions.create
    whole = create(model=MODEL, messages=user(content), **GREEDY).choices[0].message.content
    begun = whole[: whole.index(" diamond")]  # as its tokens are cut
    messages = [*user(content), {"role": "assistant", "content": begun}]
    said = create(model=MODEL, messages=messages, **GREEDY).choices[0].message
    assert begun + said.content == whole and len(said.boxes) <= 1
    chunks = create(model=MODEL, messages=messages, stream=True, **GREEDY)
    assert begun + "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    other = create(model=MODEL, messages=messages, extra_body={"add_generation_prompt": True}, **GREEDY)
    assert other.usage.prompt_tokens > create(model=MODEL, messages=messages, **GREEDY).usage.prompt_tokens


@pytest.mark.parametrize("roles", ["ssu", "us", "usu", "au", "aau", "uaau", "s", "a", "uas"])
def test_any_order_of_messages_is_answered(server: Server, roles: str) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[role], "content": f"{role}{at}"} for at, role in enumerate(roles)]
    said = server.post({"model": MODEL, "messages": messages, "max_tokens": 2})
    assert said.status_code == 200, said.text


ONE = user("a")
WRONG = [
    ({"messages": ONE}, "model", None),
    ({"model": 7, "messages": ONE}, "model", None),
    ({"model": MODEL}, "messages", None),
    ({"model": MODEL, "messages": []}, "messages", None),
    ({"model": MODEL, "messages": "hi"}, "messages", None),
    ({"model": MODEL, "messages": ONE, "continue_final_message": True}, "continue_final_message", None),
    ({"model": MODEL, "messages": ONE, "add_generation_prompt": False}, "add_generation_prompt", None),
    ({"model": MODEL, "messages": [{"role": "assistant", "tool_calls": [{}]}, *ONE]}, "messages[0].tool_calls", None),
    ({"model": MODEL, "messages": [{"role": "tool", "content": "b"}]}, "messages[0].role", None),
    ({"model": MODEL, "messages": user(None)}, "messages[0].content", None),
    ({"model": MODEL, "messages": user([])}, "messages[0].content", None),
    ({"model": MODEL, "messages": user([{"type": "input_audio"}])}, "messages[0].content[0].type", None),
    ({"model": MODEL, "messages": user([{"type": "image_url",
     "image_url": 7}])}, "messages[0].content[0].image_url", None),
    ({"model": MODEL, "messages": ONE, "temperature": 2.5}, "temperature", None),
    ({"model": MODEL, "messages": ONE, "temperature": True}, "temperature", None),
    ({"model": MODEL, "messages": ONE, "top_p": 0}, "top_p", None),
    ({"model": MODEL, "messages": ONE, "top_k": -2}, "top_k", None),
    ({"model": MODEL, "messages": ONE, "max_tokens": 0}, "max_tokens", None),
    ({"model": MODEL, "messages": ONE, "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", None),
    ({"model": MODEL, "messages": ONE, "n": 9}, "n", None),
    ({"model": MODEL, "messages": ONE, "seed": 1.5}, "seed", None),
    ({"model": MODEL, "messages": ONE, "stop": ["a"] * 5}, "stop", None),
    ({"model": MODEL, "messages": ONE, "stop": ""}, "stop", None),
    ({"model": MODEL, "messages": ONE, "stream": "yes"}, "stream", None),
    ({"model": MODEL, "messages": ONE, "stream_options": {"include_usage": True}}, "stream_options", None),
    ({"model": MODEL, "messages": ONE, "temprature": 1}, "temprature", "unknown_parameter"),
    ({"model": MODEL, "messages": ONE, "logprobs": 3}, "logprobs", None),
    ({"model": MODEL, "messages": ONE, "top_logprobs": 3}, "top_logprobs", None),
    ({"model": MODEL, "messages": ONE, "response_format": {"type": "xml"}}, "response_format.type", None),
    ({"model": MODEL, "messages": ONE, "tools": [{}]}, "tools", "unsupported_parameter"),
    ({"model": MODEL, "messages": ONE, "presence_penalty": 3}, "presence_penalty", None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "code"), WRONG)
def test_a_wrong_field_is_named_in_a_400(server: Server, body: dict, param: str, code: str | None) -> None:
    response = server.post(content=json.dumps(body))
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and error["code"] == code
    assert error["type"] == "invalid_request_error" and error["message"].startswith(param)


def test_neutral_values_that_clients_send_are_taken(server: Server) -> None:
    fields = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "u", "logprobs": False}
    fields |= {"tools": None, "response_format": {"type": "text"}, "max_tokens": 1, "top_logprobs": 0}
    assert server.ask("a", **fields).status_code == 200


def test_a_prompt_that_does_not_fit_is_a_400_with_both_numbers(server: Server) -> None:
    for stream in (False, True):
        response = server.ask("word " * 9000, stream=stream)
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
        assert "this model's maximum context length is 8192 tokens" in response.json()["error"]["message"]


def test_paths_and_methods_that_do_not_exist_are_refused_in_openais_shape(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as wrong:
        server.client.chat.completions.create(model="gpt-4o", messages=ONE)
    assert wrong.value.code == "model_not_found" and wrong.value.param == "model"
    missing = httpx.get(f"{server.url}/v1/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
    message = missing.json()["error"]["message"]
    assert "there is no /v1/nothing here" in message and "/v1/chat/completions" in message and "/v1/models" in message
    odd = httpx.get(f"{server.url}/v1/<b>%0d%0ax").json()["error"]["message"]
    assert odd.startswith("there is no such path here")
    for method in ("GET", "OPTIONS", "PUT"):
        response = httpx.request(method, f"{server.url}/v1/chat/completions")
        assert response.status_code == 405 and response.headers["allow"] == "POST"
        assert response.json()["error"]["code"] == "method_not_allowed"


def raising(error: BaseException):
    def before(index: int) -> None:
        raise error

    return before


@pytest.mark.parametrize(
    ("error", "status", "code", "kind"),
    [
        (QueueFull(9, retry_after=3), 429, "queue_full", openai.RateLimitError),
        (OutOfMemory("no memory"), 503, "out_of_memory", openai.InternalServerError),
        (TimeLimit("too long"), 503, "time_limit", openai.InternalServerError),
        (PromptError("bad"), 400, "bad_prompt", openai.BadRequestError),
        (EngineFailed("secret"), 500, "internal_error", openai.InternalServerError),
        (RuntimeError("secret"), 500, "internal_error", openai.InternalServerError),
    ],
)
def test_the_engines_errors_have_their_status(error, status: int, code: str, kind, caplog) -> None:
    with serving(ScriptedWorker("x", before=raising(error))) as server:
        with pytest.raises(kind) as said:
            server.client.chat.completions.create(model=MODEL, messages=ONE)
        streamed = server.ask("a", stream=True)
    assert said.value.status_code == streamed.status_code == status and said.value.code == code
    assert said.value.response.headers.get("retry-after") == ("3" if status == 429 else None)
    assert "secret" not in said.value.response.text + caplog.text


def test_an_error_within_a_stream_is_its_last_event() -> None:
    def before(index: int) -> None:
        if index == 1:
            raise OutOfMemory("no memory for more")

    with serving(ScriptedWorker("one", "two", before=before)) as server:
        stream = server.client.chat.completions.create(model=MODEL, messages=ONE, stream=True)
        with pytest.raises(openai.APIError, match="no memory for more"):
            list(stream)


def test_a_long_silence_in_a_stream_is_filled_with_pings() -> None:
    release = asyncio.Event()

    def before(index: int):
        return release.wait() if index == 0 else None

    with serving(ScriptedWorker("late", before=before), ping_s=0.02) as server:
        body = {"model": MODEL, "messages": ONE, "stream": True}
        lines = []
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                lines.append(line)
                if lines.count(": ping") == 2:
                    release.set()
    assert response.status_code == 200 and lines.count(": ping") >= 2
    assert any("late" in line for line in lines) and lines[-2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_cancels_the_answer(stream: bool) -> None:
    engine = ScriptedWorker("one", "two", before=lambda index: for_ever() if index else None)
    with serving(engine) as server:
        body = json.dumps({"model": MODEL, "messages": ONE, "stream": stream}).encode()
        host, port = server.url[7:].split(":")
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: engine.requests)
            if stream:
                assert b"200 OK" in connection.recv(1000)
        until(engine.cancelled.is_set)
        engine.before = None
        assert server.ask("a").status_code == 200


def test_log_probabilities_and_formats_pass_through_to_the_engine_and_back() -> None:
    token = TokenLogprob(7, -0.5, ((8, -1.0), (9, -2.0)))
    engine = ScriptedWorker(Piece("é", (token,)), tokens={7: "é".encode(), 8: b"\xc3", 9: b"b"})
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}
    with serving(engine) as server:
        create = server.client.chat.completions.create
        options = {"logprobs": True, "top_logprobs": 2, "response_format": shape}
        said = create(model=MODEL, messages=ONE, **options).choices[0].logprobs
        streamed = [c.choices[0].logprobs for c in create(model=MODEL, messages=ONE, stream=True, **options)]
    assert engine.requests[0].generation == {"logprobs": 2, "response_format": shape}
    assert (said.content[0].token, said.content[0].bytes, said.content[0].logprob) == ("é", [195, 169], -0.5)
    assert [(top.bytes, top.logprob) for top in said.content[0].top_logprobs] == [([195], -1.0), ([98], -2.0)]
    assert [each.model_dump() for each in streamed if each] == [said.model_dump()]


def test_more_requests_than_allowed_are_refused_before_their_body_is_read() -> None:
    release = threading.Event()

    async def wait() -> None:
        while not release.is_set():
            await asyncio.sleep(0.005)

    engine = ScriptedWorker("x", before=lambda index: wait())
    with serving(engine, max_concurrent=1) as server:
        answers: list[httpx.Response] = []
        first = threading.Thread(target=lambda: answers.append(server.ask("a")))
        first.start()
        until(lambda: engine.requests)
        refused = server.post(content=b"not even JSON")
        release.set()
        first.join()
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert answers[0].status_code == server.ask("a").status_code == server.ask("a", stream=True).status_code == 200
        assert server.ask("a").status_code == 200


def test_limits_on_messages_and_images(scenes: list[Scene]) -> None:
    image = picture(data_uri(Image.new("RGB", (2, 2))))
    with serving(ScriptedWorker("x"), limits=Limits(messages=2, images=2, n=1)) as server:
        assert server.ask([image, image]).status_code == 200
        assert server.ask([image] * 3).json()["error"]["code"] == "too_many_images"
        assert server.post({"model": MODEL, "messages": ONE * 3}).json()["error"]["param"] == "messages"
        assert server.ask("a", n=2).json()["error"]["param"] == "n"


def test_metrics_count_requests_tokens_and_image_cache_hits(runtime: Runtime, scenes: list[Scene]) -> None:
    engine = Worker(runtime)
    with serving(engine) as server:
        content = [picture(data_uri(Image.new("RGB", (30, 30), "teal"))), text("hi")]
        usages = [server.ask(content, max_tokens=2).json()["usage"] for _ in range(2)]
        server.ask("a", n=0)
        httpx.get(f"{server.url}/made/up")
        metric = server.metric
        assert metric('qvl_edge_requests_total{route="/v1/chat/completions",status="200"}') == 2
        assert metric('qvl_edge_requests_total{route="/v1/chat/completions",status="400"}') == 1
        assert metric('qvl_edge_requests_total{route="other",status="404"}') == 1
        assert metric("qvl_edge_prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
        assert metric("qvl_edge_completion_tokens_total") == 4
        assert (metric("qvl_edge_images_total"), metric("qvl_edge_cached_images_total")) == (2, 1)
        for name in ("time_to_first_token", "request"):
            assert metric(f'qvl_edge_{name}_seconds_bucket{{le="+Inf"}}') == 2
            assert metric(f"qvl_edge_{name}_seconds_count") == 2
        assert metric("qvl_edge_requests_waiting") == 0
        assert "hi" not in httpx.get(f"{server.url}/metrics").text.split()


def test_a_real_engine_gives_log_probabilities_and_json_to_the_client(server: Server, runtime: Runtime) -> None:
    pytest.importorskip("llguidance")
    create = server.client.chat.completions.create
    said = create(model=MODEL, messages=ONE, temperature=0, max_tokens=6, logprobs=True, top_logprobs=2).choices[0]
    raw = b"".join(bytes(token.bytes) for token in said.logprobs.content)  # a token may be half a character
    assert raw.decode(errors="replace").strip() == said.message.content
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in said.logprobs.content)
    schema = {"type": "object", "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 9}}}
    schema |= {"required": ["count"], "additionalProperties": False}
    shape = {"type": "json_schema", "json_schema": {"name": "counted", "schema": schema}}
    answer = create(model=MODEL, messages=ONE, response_format=shape, seed=1).choices[0]
    assert set(json.loads(answer.message.content)) == {"count"} and answer.finish_reason == "stop"
