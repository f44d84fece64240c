"""OpenAI's responses, without state: text, pictures, history, structure and the events of a stream."""

import json

import openai
import pytest

from qvl_edge.demo.scenes import Scene
from qvl_edge.errors import OutOfMemory
from qvl_edge.runtime import Runtime

from .harness import MODEL, ScriptedWorker, Server, data_uri, serving

pytestmark = pytest.mark.slow


def test_a_text_is_answered_as_in_chat(server: Server, runtime: Runtime) -> None:
    said = server.client.responses.create(model=MODEL, input="hello", instructions="Be brief.", temperature=0)
    expected = runtime.answer("hello", system="Be brief.", do_sample=False)
    assert said.output_text == expected.text and said.status == "completed" and said.error is None
    usage = expected.usage
    assert (said.usage.input_tokens, said.usage.output_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    cut = server.client.responses.create(model=MODEL, input="hello", max_output_tokens=2, temperature=0)
    assert (cut.status, cut.incomplete_details.reason, cut.usage.output_tokens) == (
        "incomplete",
        "max_output_tokens",
        2,
    )


def test_a_picture_and_the_output_as_history(server: Server, scenes: list[Scene]) -> None:
    create = server.client.responses.create
    image = {"type": "input_image", "image_url": data_uri(scenes[0].image), "detail": "auto"}
    asked = {"role": "user", "content": [image, {"type": "input_text", "text": "Find the red diamond."}]}
    said = create(model=MODEL, input=[asked], temperature=0)
    (box,) = said.output[0].content[0].boxes
    (target,) = (shape for shape in scenes[0].shapes if shape.name("en") == "red diamond")
    assert box["corners"] == list(target.box)
    history = [asked, *(item.model_dump() for item in said.output), {"type": "reasoning", "id": "r", "summary": []}]
    again = create(model=MODEL, input=[*history, {"role": "user", "content": "Find the red diamond."}], temperature=0)
    chat = [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": image["image_url"]}}, "Find the red diamond."],
        },
        {"role": "assistant", "content": said.output_text},
        {"role": "user", "content": "Find the red diamond."},
    ]
    same = server.client.chat.completions.create(model=MODEL, messages=chat, temperature=0)
    assert again.output_text == same.choices[0].message.content and again.usage.input_tokens == same.usage.prompt_tokens


def test_the_events_of_a_stream_are_openais_and_add_up_to_the_response(server: Server) -> None:
    whole = server.client.responses.create(model=MODEL, input="hello", temperature=0)
    events = list(server.client.responses.create(model=MODEL, input="hello", temperature=0, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-4].text == events[-1].response.output_text and text.strip() == whole.output_text
    assert events[-1].response.usage.total_tokens == whole.usage.total_tokens
    with server.client.responses.stream(model=MODEL, input="hello", temperature=0) as stream:
        assert stream.get_final_response().output_text == text


def test_a_schema_is_kept_to(server: Server) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"count": {"type": "integer", "maximum": 9, "minimum": 0}}}
    schema["required"] = ["count"]
    shape = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    said = server.client.responses.create(model=MODEL, input="hello", text={"format": shape})
    assert set(json.loads(said.output_text)) == {"count"} and said.status == "completed"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input[0].type"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"role": "assistant", "content": [{"type": "input_image", "image_url": "data:"}]}]},
         "input[0].content[0].image_url"),
        ({"input": "<img>a/b.png</img>"}, "input[0].content"),
        ({"instructions": "<img>a/b.png</img>"}, "instructions"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "json_schema", "nam": "x"}}}, "text.format.nam"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_named(fields: dict, param: str) -> None:
    with serving(ScriptedWorker("x")) as server, pytest.raises(openai.BadRequestError) as said:
        server.client.post("/responses", body={"model": MODEL, "input": "a", **fields}, cast_to=object)
    assert said.value.param == param


def test_what_clients_send_without_effect_is_taken() -> None:
    fields = {"store": True, "include": [], "parallel_tool_calls": True, "reasoning": {"effort": "low"}, "tools": []}
    fields |= {"previous_response_id": None, "truncation": "auto", "text": {"verbosity": "low"}, "metadata": {"a": "b"}}
    with serving(ScriptedWorker("x")) as server:
        assert server.client.responses.create(model=MODEL, input="a", **fields).output_text == "x"


def test_an_error_within_a_stream_is_an_event() -> None:
    def before(index: int) -> None:
        if index == 1:
            raise OutOfMemory("no memory for more")

    with serving(ScriptedWorker("one", "two", before=before)) as server:
        events = list(server.client.responses.create(model=MODEL, input="a", stream=True))
    assert (events[-1].type, events[-1].code, events[-1].message) == ("error", "out_of_memory", "no memory for more")
