"""Runtime: a loaded model that answers about images."""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch
from PIL import Image

from qvl_edge.answer import Answer
from qvl_edge.arguments import GenerationArguments, LoadArguments
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.engine.budget import Plan
from qvl_edge.engine.constraint import MinNewTokens, constraint_for
from qvl_edge.engine.engine import Engine
from qvl_edge.engine.request import Request
from qvl_edge.engine.slots import Slots
from qvl_edge.errors import ConfigError, ContextError, PromptError, QvlError, Stopped
from qvl_edge.load import load
from qvl_edge.memory import trim_heap
from qvl_edge.model.decoder import QWenLMHeadModel
from qvl_edge.model.fused import FusedDecoder
from qvl_edge.options import GenerationOptions, LoadOptions
from qvl_edge.published import SYSTEM
from qvl_edge.text.boxes import parse_boxes
from qvl_edge.text.draw import draw_boxes
from qvl_edge.text.list_format import from_list_format, to_list_format
from qvl_edge.text.prompt import (
    History,
    Prompt,
    Query,
    chat_prompt,
    latest_picture,
    messages_prompt,
    raw_prompt,
    stop_token_ids,
)
from qvl_edge.text.tokenizer import TextStream, Tokenizer
from qvl_edge.vision.features import FeatureCache
from qvl_edge.vision.image import load_image, load_picture
from qvl_edge.vision.rgb import BACKGROUND
from qvl_edge.vision.source import ImageLike
from qvl_edge.vit_cache import Progress


class Runtime:
    """A model ready to answer. Make one with `from_pretrained`.

    Any thread may ask it at any time: all requests go through one Engine, which answers them together where `slots`
    allows it and one after another where not. Generation options are those of GenerationOptions, by their names.
    """

    def __init__(
        self,
        decoder: QWenLMHeadModel | FusedDecoder,
        vision: FeatureCache,
        tokenizer: Tokenizer,
        generation_config: dict[str, Any],
        plan: Plan,
        *,
        lookup: int = 0,
        background: str = BACKGROUND,
        checkpoint: Checkpoint | None = None,
    ):
        self.config, self.plan, self.max_context = decoder.config, plan, plan.context
        self.decoder, self.vision, self.tokenizer, self.background = decoder, vision, tokenizer, background
        self.generation_config, self._checkpoint = generation_config, checkpoint
        self.options = GenerationOptions.from_config(generation_config)
        self.chat_format = str(generation_config.get("chat_format") or "raw")
        self.max_window_size = generation_config.get("max_window_size") or 6144
        kv_cache = torch.int8 if plan.kv_cache == "int8" else None
        self.engine = Engine(Slots(decoder, capacity=plan.context, count=plan.slots, kv_cache=kv_cache, lookup=lookup))

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str], *, progress: Progress | None = None, **options: Unpack[LoadArguments]
    ) -> "Runtime":
        """Load a bundle, or an untouched checkpoint (float or Int4): a folder, or a name like "Qwen/Qwen-VL-Chat-Int4".

        options: those of LoadOptions, by name (device, dtype, profile, max_context, …; docs/options.md). A checkpoint's
        precision is never changed: int4 runs as int4 and float as float; its vision tower is exported once, into
        cache_dir. A bundle's tower is as it was exported. progress gets lines of text; files that are left over in the
        folder are named in a warning.

        BundleError, CheckpointError and ConfigError name what is missing and the command that makes it; FitError comes
        before anything is allocated, with both numbers and what would fit.
        """
        asked = LoadOptions.of(options)
        loaded = load(path, asked, progress)
        return cls(
            loaded.decoder,
            FeatureCache(loaded.encoder, loaded.checkpoint.config.visual.image_size),
            loaded.tokenizer,
            loaded.generation,
            loaded.plan,
            lookup=asked.lookup,
            background=asked.background,
            checkpoint=loaded.checkpoint,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the files that the model was loaded from; empty for one that was put together by hand."""
        return self._checkpoint.fingerprint if self._checkpoint is not None else ""

    def close(self) -> None:
        """Give the model's memory back now, and end what is being answered; using it afterwards is a QvlError.

        The end of a `with Runtime.from_pretrained(…) as runtime:` does the same.
        """
        if "engine" not in vars(self):
            return
        self.engine.abort_all(Stopped("the Runtime was closed"))
        on_cuda = self.decoder.device.type == "cuda"
        del self.engine, self.decoder, self.vision
        gc.collect()
        trim_heap()
        if on_cuda:
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    if not TYPE_CHECKING:  # for a checker there are no other names than those that are written out

        def __getattr__(self, name: str) -> Any:
            if name in ("engine", "decoder", "vision"):
                raise QvlError("this Runtime is closed; load the model again with Runtime.from_pretrained")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def answer(
        self,
        query: Query,
        history: History | None = None,
        system: str = SYSTEM,
        chat_format: str | None = None,
        **generation: Unpack[GenerationArguments],
    ) -> Answer:
        """Answer `query`: text, or a list of {"image": …}, {"text": …}, {"ref": …, "box": …} elements.

        An image is a path, bytes, an open file, a PIL image, a numpy array, a data URI or base64. history: earlier
        (query, response) turns.
        chat_format: "chatml" or "raw" (default: the model's). ImageError, PromptError or ConfigError on a bad argument.
        """
        return self._run(Request(query, history or (), system, chat_format, generation)).answer()

    def answer_stream(
        self,
        query: Query,
        history: History | None = None,
        system: str = SYSTEM,
        chat_format: str | None = None,
        **generation: Unpack[GenerationArguments],
    ) -> Iterator[str | Answer]:
        """Like `answer`, but yields pieces of text as they come (never half a character), then the Answer.

        Closing the iterator ends the answer. One that is left unfinished keeps its slot until then.
        """
        request = self.prepare(Request(query, history or (), system, chat_format, generation))
        yield from self.engine.stream(request)
        yield request.answer()

    def ask(
        self, images: ImageLike | Sequence[ImageLike], question: str, **generation: Unpack[GenerationArguments]
    ) -> Answer:
        """Answer a question about one image or a list of images.

        images: a path, bytes, an open file, a PIL image, a numpy array, a data URI or base64; or a list of them, which
        the question calls Picture 1, Picture 2, …
        question: the text, in any language; "Find …" and "框出…" ask for boxes.
        generation: options by their Hugging Face names, such as max_new_tokens=64 or do_sample=False.

        ImageError for a picture that cannot be read, PromptError for a prompt that does not fit, ConfigError for an
        option that is not known.

            answer = runtime.ask("street.jpg", "Find the red car.")
            answer.plain_text, answer.boxes[0].pixels
            answer.draw().save("out.png")
        """
        several = images if isinstance(images, list | tuple) else [images]
        if not several:
            raise PromptError("ask has no image; give one or more, or use answer for text alone")
        query: list[dict[str, Any]] = [*({"image": image} for image in several), {"text": question}]
        return self.answer(query, **generation)

    def map(
        self,
        images: Iterable[ImageLike],
        question: str,
        *,
        output: str | PathLike[str] | None = None,
        progress: bool | None = None,
        **generation: Unpack[GenerationArguments],
    ) -> Iterator[Answer]:
        """The answer to one question about each of many images, in their order, as they come.

        As many are answered at once as the model was loaded with `slots`. output: a JSON lines file that keeps each
        answer; where it exists, what it holds is not asked again. progress: a bar on stderr; None: on a terminal only.
        The first image that cannot be answered ends it with its error (qvl_edge.batch.answer_each goes on).
        """
        from qvl_edge.batch import answer_each

        if isinstance(images, str | bytes | Mapping) or not isinstance(images, Iterable):
            raise PromptError(f"images is a {type(images).__name__}, expected a list of images; ask takes a single one")
        for answer in answer_each(self, list(images), question, output=output, progress=progress, **generation):
            if isinstance(answer, QvlError):
                raise answer
            yield answer

    def chat(
        self,
        query: Query,
        history: History | None = None,
        system: str = SYSTEM,
        **generation: Unpack[GenerationArguments],
    ) -> tuple[str, list[tuple[Query, str]]]:
        """(response, history with this turn), as upstream's model.chat. `<img>path</img>` in strings is an image."""
        request = Request(query, history or (), system, "chatml", generation, markup_images=True)
        response = self._run(request).answer().text
        return response, [*((q, r) for q, r in history or []), (query, response)]

    def chat_stream(
        self,
        query: Query,
        history: History | None = None,
        system: str = SYSTEM,
        **generation: Unpack[GenerationArguments],
    ) -> Iterator[str]:
        """The response as it grows: each item is all of the text so far, as upstream's model.chat_stream."""
        request = Request(query, history or (), system, "chatml", generation, markup_images=True)
        text = ""
        for piece in self.engine.stream(self.prepare(request)):
            text += piece
            yield text

    def generate(self, query: Query, **generation: Unpack[GenerationArguments]) -> Answer:
        """Continue `query` in raw format, as the base model is used. `<img>path</img>` in strings is an image."""
        return self._run(Request(query, (), "", "raw", generation, markup_images=True)).answer()

    def generate_ids(
        self,
        ids: list[int],
        image_starts: list[int],
        images: Sequence[ImageLike],
        **generation: Unpack[GenerationArguments],
    ) -> Answer:
        """Continue token ids in raw format; the 256 slots from each of `image_starts` on receive that image."""
        prompt = Prompt(ids=ids, image_starts=image_starts, images=list(images), text="")
        return self._run(Request(prompt=prompt, chat_format="raw", generation=generation)).answer()

    def score(
        self, query: Query, continuation: str, history: History | None = None, *, chat_format: str | None = None
    ) -> list[float]:
        """Natural-log probability of each token of `continuation` as the answer to `query`."""
        if not isinstance(continuation, str):
            raise PromptError(f"continuation is a {type(continuation).__name__}, expected a string")
        ids = self.tokenizer.encode(continuation)
        if not ids:
            raise PromptError("continuation is empty; there is nothing to score")
        request = Request(query, history or (), chat_format=chat_format)
        prompt = self._prompt(request)
        length = len(prompt.ids)
        request.prompt = replace(prompt, ids=[*prompt.ids, *ids])
        request.scored, request.alpha_length = [(length, length + len(ids))], length
        return self._run(request).scores

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Answer many requests, as many at once as there are slots: each as it gets done, with its answer or its error.

        The next one is taken from `requests`, and its images are opened, when a slot is free.
        """

        def prepared() -> Iterator[Request]:
            for request in requests:
                try:
                    self.prepare(request)
                except QvlError as error:
                    request.fail(error)
                yield request

        return self.engine.run(prepared())

    def prepare(self, request: Request) -> Request:
        """Turn what was asked into token ids and image features: the request can be given to the engine.

        ImageError, PromptError or ConfigError for what cannot be answered.
        """
        if (characters := request.characters) > self.tokenizer.most_characters(self.max_context):
            raise ContextError(  # before any of it is tokenized: 30 MB of text took 12 s and 1 GB
                f"this model's maximum context length is {self.max_context} tokens, and a text of {characters} "
                "characters has more; shorten it"
            )
        prompt = request.prompt or self._prompt(request)
        if any(not 0 <= token < self.config.vocab_size for token in prompt.ids):
            raise PromptError(f"the prompt has a token id that is not one of 0 to {self.config.vocab_size - 1}")
        if not prompt.ids:
            raise PromptError("the prompt is empty; give some text or an image")
        self._check_context(len(prompt.ids) + (not request.scored))
        options = self.options.with_overrides(request.generation)
        options.check_vocab(self.config.vocab_size)
        stop_ids = frozenset(options.stop_token_ids)
        if not options.ignore_eos:
            stop_ids |= stop_token_ids(self.tokenizer, request.chat_format or self.chat_format)
        vocab = self.config.vocab_size
        constraint = constraint_for(
            options.response_format, self.tokenizer, vocab, stop_ids or frozenset({0}), request.cache_salt
        )
        if options.min_new_tokens:
            constraint = MinNewTokens(options.min_new_tokens, stop_ids, vocab, constraint)
        request.set_prompt(
            prompt.ids,
            options,
            room=min(options.max_new_tokens, self.max_context - len(prompt.ids)),
            stop_ids=stop_ids,
            stream=TextStream(self.tokenizer, options.stop),
            constraint=constraint,
            device=self.decoder.device,
        )
        self._encode(request, prompt)
        return request

    def warm_up(self) -> None:
        """Compile and load on a GPU what the first answers would wait for."""
        with self.engine.lock:
            self.engine.slots.warm_up()

    def forget(self) -> None:
        """Drop what was kept of earlier answers, keys and values and image features: the next one starts afresh."""
        with self.engine.lock:
            self.engine.slots.forget()
        self.vision.forget()

    from_list_format = staticmethod(from_list_format)
    to_list_format = staticmethod(to_list_format)

    @staticmethod
    def draw_bbox_on_latest_picture(response: str, history: History | None = None) -> Image.Image | None:
        """The latest picture of `history` with the boxes of `response` drawn on it; None if there is neither."""
        if not isinstance(response, str):
            raise PromptError(f"response is a {type(response).__name__}, expected a string")
        picture = latest_picture(history or [])
        if picture is None:
            return None
        image = load_image(picture)
        boxes = parse_boxes(response, image_sizes=[image.size])
        return draw_boxes(image, boxes) if boxes else None

    def _prompt(self, request: Request) -> Prompt:
        chat_format = request.chat_format or self.chat_format
        if chat_format == "raw":
            if request.messages:
                return self._raw_messages(request)
            return raw_prompt(self.tokenizer, request.query, markup_images=request.markup_images)
        if chat_format != "chatml":
            raise ConfigError(f"chat_format is {chat_format!r}, known are 'chatml' and 'raw'")
        if request.messages:
            window = self.max_window_size
            return messages_prompt(
                self.tokenizer, request.messages, continued=request.continued, max_window_size=window
            )
        return chat_prompt(
            self.tokenizer,
            request.query,
            request.history,
            request.system,
            max_window_size=self.max_window_size,
            markup_images=request.markup_images,
        )

    def _raw_messages(self, request: Request) -> Prompt:
        """One message of the user's as it is: the base model knows no turns."""
        if len(request.messages) > 1 or request.messages[0].role != "user":
            raise PromptError(
                "the model's chat_format is 'raw', which has no turns: send one user message, or use /v1/completions"
            )
        return raw_prompt(self.tokenizer, request.messages[0].content, markup_images=False)

    def _encode(self, request: Request, prompt: Prompt) -> None:
        size, background = self.config.visual.image_size, self.background
        pictures = [load_picture(image, size, background=background) for image in prompt.images]
        images = [picture.square for picture in pictures]
        if self.plan.vision == "released":  # the tower and the cache must not be in memory together
            with self.engine.lock:
                if not self.engine.slots.requests and not self.vision.holds(images, request.cache_salt):
                    self.engine.slots.unload()
        encoded = self.vision.encode(images, request.cache_salt)
        request.images, request.sources = [picture.frame for picture in pictures], prompt.images
        request.cached_images, request.image_s = encoded.cached, encoded.seconds
        request.set_features(prompt.image_starts, encoded.keys, encoded.features)

    def _run(self, request: Request) -> Request:
        return self.engine.complete(self.prepare(request))

    def _check_context(self, positions: int) -> None:
        if positions > self.max_context:
            # clients look for the words in brackets, to cut a conversation
            raise ContextError(
                f"the prompt needs {positions} tokens, room for the answer's first one included, and the context holds "
                f"{self.max_context} (this model's maximum context length is {self.max_context} tokens); shorten the "
                "text, send fewer images (258 tokens each) or raise max_context (at most "
                f"{self.config.max_position_embeddings})"
            )
