"""POST /v1/completions: text that a model continues as it is, in the raw format of the base model."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from qvl_edge.answer import Answer, FinishReason, TokenLogprob
from qvl_edge.engine.request import Piece, Request
from qvl_edge.server.chat import draws, new_head, usage_of
from qvl_edge.server.endpoint import Backend, Endpoint, Reply
from qvl_edge.server.fields import Model, TokenId, complete, option
from qvl_edge.server.fields import Request as Fields
from qvl_edge.server.messages import markup
from qvl_edge.server.protocol import Count, Head, StreamOptions, Usage, stream_conflicts
from qvl_edge.server.refusal import invalid, refuse
from qvl_edge.server.settings import Limits
from qvl_edge.text.prompt import Prompt
from qvl_edge.text.tokenizer import Tokenizer

MAX_TOKENS = 16  # where the request says nothing, as OpenAI and vLLM


def _prompts(prompt: Any) -> Any:
    """One prompt as a list of one."""
    one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int))
    return [prompt] if one else prompt


Ids = Annotated[list[TokenId], Field(min_length=1)]
OnePrompt = Annotated[str, Field(min_length=1)] | Ids
Prompts = Annotated[list[OnePrompt], Field(min_length=1)]


class CompletionRequest(Fields):
    """The body of POST /v1/completions."""

    prompt: Annotated[Prompts, BeforeValidator(_prompts, json_schema_input_type=OnePrompt | Prompts)]
    n: int | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = option("logprobs")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        found = [*self.conflicts(), *stream_conflicts(self.stream_options, self.stream)]
        texts = (text for text in self.prompt if isinstance(text, str))
        refuse(found + [refusal for text in texts for refusal in markup(text, "prompt")])
        return self

    def generation(self) -> dict[str, Any]:
        """The options that were given, under the names of GenerationOptions."""
        logprobs = {} if self.logprobs is None else {"logprobs": self.logprobs}
        return {"max_new_tokens": MAX_TOKENS} | super().generation() | logprobs


class CompletionLogprobs(Model):
    """Of the tokens of a text, with their places in it."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[Count]


class CompletionChoice(Model):
    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Head):
    """The response, or an event of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


def completion_model(name: str, limits: Limits, *aliases: str) -> type[CompletionRequest]:
    """CompletionRequest for a server of a model with these names."""
    n = (int | None, Field(None, ge=1, le=limits.n))
    return complete(CompletionRequest, (name, *aliases), {"echo": Literal[False], "suffix": Literal[""]}, (), n=n)


def completion_endpoint(backend: Backend) -> Endpoint[CompletionRequest]:
    """The endpoint."""
    settings = backend.settings

    async def read(asked: CompletionRequest) -> tuple[list[Request], Reply]:
        limit = settings.limits.prompts
        if len(asked.prompt) * (asked.n or 1) > limit:
            raise invalid(
                "prompt", f"{len(asked.prompt)} prompts for {asked.n or 1} answers each, at most {limit} in all"
            )
        wanted = [
            _request(prompt, generation) for prompt in asked.prompt for generation in draws(asked.generation(), asked.n)
        ]
        head = new_head("cmpl", asked.model, settings.fingerprint)
        return wanted, CompletionReply(asked, head, backend.worker.runtime.tokenizer)

    return Endpoint(backend, completion_model(settings.model, settings.limits, *settings.aliases), read)


def _request(prompt: str | list[int], generation: dict[str, Any]) -> Request:
    if isinstance(prompt, str):
        return Request(prompt, chat_format="raw", generation=generation)
    return Request(prompt=Prompt(ids=prompt), chat_format="raw", generation=generation)


class CompletionReply(Reply):
    """A completion, or its chunks; a text is what was generated, from its first space on."""

    def __init__(self, asked: CompletionRequest, head: dict[str, Any], tokenizer: Tokenizer):
        super().__init__()
        self.head, self.decode, self.prompts = head, tokenizer.decode_bytes, len(asked.prompt)
        self.include_usage = bool(asked.stream_options and asked.stream_options.include_usage)

    def whole(self) -> Completion:
        """See Reply."""
        choices = [
            CompletionChoice(
                index=index,
                text=self.texts[index],
                logprobs=self._logprobs(self.logprobs[index], 0),
                finish_reason=answer.finish_reason,
            )
            for index, answer in sorted(self.answers.items())
        ]
        return Completion(**self.head, object="text_completion", choices=choices, usage=self._usage())

    def events(self, index: int, event: Piece | Answer) -> Iterator[Completion]:
        """Text, then its finish_reason."""
        offset = len(self.texts.get(index, ""))
        self.add(index, event)
        if isinstance(event, Piece):
            logprobs = self._logprobs(event.logprobs, offset)
            choice = CompletionChoice(index=index, text=event.text, logprobs=logprobs, finish_reason=None)
        else:
            choice = CompletionChoice(index=index, text="", logprobs=None, finish_reason=event.finish_reason)
        no_usage: dict[str, Any] = {"usage": None} if self.include_usage else {}
        yield Completion(**self.head, object="text_completion", choices=[choice], **no_usage)

    def last_events(self) -> Iterator[Completion]:
        """The usage, if it was asked for."""
        if self.include_usage:
            yield Completion(**self.head, object="text_completion", choices=[], usage=self._usage())

    def _usage(self) -> Usage:
        return usage_of([answer for _, answer in sorted(self.answers.items())], self.prompts)

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs | None:
        if not tokens:
            return None
        shown = [self._shown(token.token_id) for token in tokens]
        places = [offset]
        for text in shown[:-1]:
            places.append(places[-1] + len(text))
        return CompletionLogprobs(
            tokens=shown,
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[{self._shown(other): logprob for other, logprob in token.top} for token in tokens],
            text_offset=places,
        )

    def _shown(self, token_id: int) -> str:
        return self.decode([token_id]).decode(errors="replace")
