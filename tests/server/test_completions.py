"""Text completions: what a model writes after a text, as OpenAI's client asks for it."""

import json

import openai
import pytest

from qvl_edge.answer import TokenLogprob
from qvl_edge.engine.request import Piece
from qvl_edge.runtime import Runtime
from qvl_edge.server.settings import Limits

from .harness import MODEL, ScriptedWorker, Server, serving

pytestmark = pytest.mark.slow

PROMPT = "Find the red diamond. <ref>red"


def test_a_completion_is_the_models_own_continuation_in_raw_format(server: Server, runtime: Runtime) -> None:
    create = server.client.completions.create
    said = create(model=MODEL, prompt=PROMPT, max_tokens=9, temperature=0)
    expected = runtime.answer(PROMPT, chat_format="raw", max_new_tokens=9, do_sample=False)
    (choice,) = said.choices
    assert choice.text.strip() == expected.text and choice.finish_reason == expected.finish_reason
    assert said.object == "text_completion" and said.usage.prompt_tokens == len(runtime.tokenizer.encode(PROMPT))
    ids = create(model=MODEL, prompt=runtime.tokenizer.encode(PROMPT), max_tokens=9, temperature=0)
    assert ids.choices[0].text == choice.text
    chunks = list(
        create(
            model=MODEL, prompt=PROMPT, max_tokens=9, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == choice.text
    assert (
        chunks[-2].choices[0].finish_reason == choice.finish_reason
        and chunks[-1].usage.total_tokens == said.usage.total_tokens
    )
    # where nothing is said it is as short as OpenAI's
    assert create(model=MODEL, prompt=PROMPT, extra_body={"ignore_eos": True}).usage.completion_tokens == 16


def test_prompts_are_answered_n_times_each_in_their_order(server: Server) -> None:
    prompts = [PROMPT, "Describe the picture. There"]
    create = server.client.completions.create
    drawn = {"n": 2, "max_tokens": 6, "temperature": 1.5, "seed": 3}
    said = create(model=MODEL, prompt=prompts, **drawn)
    assert [choice.index for choice in said.choices] == [0, 1, 2, 3]
    for at, prompt in enumerate(prompts):
        alone = create(model=MODEL, prompt=prompt, **drawn)
        assert [c.text for c in alone.choices] == [c.text for c in said.choices[2 * at : 2 * at + 2]]
    alone = [create(model=MODEL, prompt=prompt, max_tokens=6).usage.prompt_tokens for prompt in prompts]
    assert said.usage.prompt_tokens == sum(alone)


def test_log_probabilities_have_the_shape_of_the_old_api() -> None:
    tokens = {7: b" on", 8: b"e", 9: b"x"}
    pieces = Piece(" on", (TokenLogprob(7, -0.5, ((7, -0.5), (9, -2.0))),)), Piece("e", (TokenLogprob(8, -0.1, ()),))
    with serving(ScriptedWorker(*pieces, tokens=tokens)) as server:
        said = server.client.completions.create(model=MODEL, prompt="a", logprobs=2).choices[0]
        streamed = list(server.client.completions.create(model=MODEL, prompt="a", logprobs=2, stream=True))
    assert (said.text, said.logprobs.tokens, said.logprobs.text_offset) == (" one", [" on", "e"], [0, 3])
    assert said.logprobs.token_logprobs == [-0.5, -0.1] and said.logprobs.top_logprobs == [{" on": -0.5, "x": -2.0}, {}]
    assert [chunk.choices[0].logprobs.text_offset for chunk in streamed[:-1]] == [[0], [3]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "Picture 1: <img>a/b.png</img>"}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({"prompt": ["a"] * 5, "n": 2}, "prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ],
)
def test_a_wrong_field_is_named(fields: dict, param: str) -> None:
    with (
        serving(ScriptedWorker("x"), limits=Limits(prompts=8)) as server,
        pytest.raises(openai.BadRequestError) as said,
    ):
        server.client.post("/completions", body={"model": MODEL, **fields}, cast_to=object)
    assert said.value.param.startswith(param)


def test_a_token_id_that_the_model_does_not_have_is_a_400(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="token id that is not one of 0 to"):
        server.client.completions.create(model=MODEL, prompt=[5, 2**31 - 1])


def test_null_and_neutral_values_are_absent(server: Server) -> None:
    fields = {"echo": False, "suffix": None, "best_of": 1, "n": 1, "logprobs": None, "logit_bias": {}, "user": "u"}
    said = server.client.post("/completions", body={"model": MODEL, "prompt": PROMPT, **fields}, cast_to=object)
    assert json.loads(json.dumps(said))["choices"][0]["logprobs"] is None
