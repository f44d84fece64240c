"""pydantic-ai."""

from pathlib import Path

from pydantic import BaseModel, Field
from pydantic_ai import Agent, BinaryContent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from scenario import MODEL, PICTURE, QUESTION, URL, found, passed, using

using("pydantic-ai-slim", "openai")
provider = OpenAIProvider(base_url=URL, api_key="none")
picture = BinaryContent(Path(PICTURE).read_bytes(), media_type="image/png")


class Count(BaseModel):
    """How many."""

    count: int = Field(ge=0, le=9)


for kind in (OpenAIChatModel, OpenAIResponsesModel):
    model = kind(MODEL, provider=provider)
    agent = Agent(model, instructions="Be brief.", model_settings={"temperature": 0})
    assert agent.run_sync("hello").output
    said = agent.run_sync([QUESTION, picture])
    found(said.output)
    found(agent.run_sync(QUESTION, message_history=said.all_messages()).output)
    stream = agent.run_stream_sync([QUESTION, picture])
    assert list(stream.stream_text())[-1].strip() == said.output
    counted = Agent(model, output_type=NativeOutput(Count), retries=0).run_sync("How many?").output
    assert isinstance(counted, Count)
    passed(f"{kind.__name__}: text, picture, history, stream, structured output")
