"""openai-agents, over responses and over chat completions."""

import asyncio

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel, Field
from scenario import DATA_URI, MODEL, QUESTION, URL, found, passed, using

using("openai-agents", "openai")
set_tracing_disabled(True)


class Count(BaseModel):
    """How many."""

    count: int = Field(ge=0, le=9)


async def main() -> None:
    client = AsyncOpenAI(base_url=URL, api_key="none")
    image = {"type": "input_image", "image_url": DATA_URI, "detail": "auto"}
    asked = {"role": "user", "content": [image, {"type": "input_text", "text": QUESTION}]}
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        model, settings = kind(model=MODEL, openai_client=client), ModelSettings(temperature=0)
        agent = Agent(name="a", instructions="Be brief.", model=model, model_settings=settings)
        assert (await Runner.run(agent, "hello")).final_output
        said = await Runner.run(agent, [asked])
        found(said.final_output)
        again = await Runner.run(agent, [*said.to_input_list(), {"role": "user", "content": QUESTION}])
        found(again.final_output)
        stream = Runner.run_streamed(agent, [asked])
        async for _ in stream.stream_events():
            pass
        assert stream.final_output.strip() == said.final_output
        counted = Agent(name="b", model=model, output_type=Count)
        assert isinstance((await Runner.run(counted, "How many?")).final_output, Count)
        passed(f"{kind.__name__}: text, picture, history, stream, structured output")


asyncio.run(main())
