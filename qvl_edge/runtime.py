"""Runtime: a loaded model that answers about images."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any, get_args

import torch
from PIL import Image

from qvl_edge.answer import Answer
from qvl_edge.bundle import Bundle, is_bundle
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.download import Source, local_folder
from qvl_edge.engine.budget import Plan, choose, estimate
from qvl_edge.engine.constraint import MinNewTokens, constraint_for
from qvl_edge.engine.device import find_device, named_with_others
from qvl_edge.engine.generate import generate
from qvl_edge.engine.inputs import Inputs
from qvl_edge.engine.memory import free_memory, parse_bytes
from qvl_edge.engine.run import Run
from qvl_edge.engine.sampling import Sampler
from qvl_edge.engine.slots import CHUNK, Slots
from qvl_edge.errors import ConfigError, PromptError
from qvl_edge.model.decoder import QWenLMHeadModel
from qvl_edge.model.fused import MOST_SEQUENCES, FusedDecoder
from qvl_edge.model.loading import load_decoder, load_fused
from qvl_edge.options import Embeddings, GenerationOptions, Head, KVType
from qvl_edge.text.boxes import parse_boxes
from qvl_edge.text.draw import draw_boxes
from qvl_edge.text.list_format import from_list_format, to_list_format
from qvl_edge.text.prompt import History, Prompt, Query, chat_prompt, latest_picture, raw_prompt, stop_token_ids
from qvl_edge.text.tokenizer import VOCAB_FILE, Tokenizer
from qvl_edge.vision.encoder import VisionEncoder
from qvl_edge.vision.features import FeatureCache
from qvl_edge.vision.image import ImageLike, load_image
from qvl_edge.vit_cache import Progress, exported_vit

SYSTEM = "You are a helpful assistant."
_SHOWN = 500_000_000  # bytes from which on loading is shown
SCORED = 256  # positions whose logits are computed at once: 156 MB of Qwen-7B's
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Runtime:
    """A model ready to answer. Make one with `from_pretrained`; it is used from one thread at a time."""

    def __init__(
        self,
        decoder: QWenLMHeadModel | FusedDecoder,
        vision: FeatureCache,
        tokenizer: Tokenizer,
        generation_config: dict[str, Any],
        plan: Plan,
        *,
        lookup: int = 0,
    ):
        self.config = decoder.config
        self.decoder, self.vision, self.tokenizer = decoder, vision, tokenizer
        self.generation_config = generation_config
        self.options = GenerationOptions.from_config(generation_config)
        self.chat_format = str(generation_config.get("chat_format", "raw"))
        self.max_window_size = int(generation_config.get("max_window_size", 6144))
        self.plan, self.max_context, self.lookup = plan, plan.context, lookup
        self.slots = self._make_slots()

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        device: str = "auto",
        dtype: str | None = None,
        profile: str = "auto",
        max_context: int | None = None,
        slots: int = 1,
        max_memory: str | int | None = None,
        kv_cache: KVType | None = None,
        head: Head | None = None,
        embeddings: Embeddings = "host",
        vision_device: str | None = None,
        release_vision: bool = False,
        lookup: int = 0,
        verify: bool = False,
        source: Source = "hf",
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> "Runtime":
        """Load a bundle, or an untouched checkpoint (float or Int4): a folder, or a name like "Qwen/Qwen-VL-Chat-Int4".

        A name that is no folder here is looked up on a hub, source "hf" or "modelscope" at `revision`, and fetched
        once (download.py); local_files_only fetches nothing.

        device is "cpu", "cuda" (or "cuda:1", …), or "auto": CUDA where torch sees it. dtype is that of the arithmetic
        and of the layers that are not int4: "float32" (the default on a CPU), "float16" (the default on CUDA) or
        "bfloat16"; int4 stays int4 and float stays float.

        profile says how exactly the rest is kept: "12g" loses nothing more, "8g" has vision tower, lm_head and cache in
        int8, "6g" the tower in int4; "auto" takes the first that fits into the free memory. A bundle's tower is as it
        was exported. kv_cache and head ("float16": as `dtype`, or "int8") override the profile. max_context is in
        positions (default: as many as fit, up to the model's), for each of `slots`, which a scheduler fills. max_memory
        ("8GB", "8GiB" or bytes) is what may be taken instead of all that is free. embeddings "host" reads the table
        from the mapped file, "device" puts it beside the rest. vision_device is where onnxruntime encodes images
        (default: as `device`); release_vision has the tower in memory only meanwhile, and the cache only otherwise.

        lookup: how many tokens a lone greedy answer may guess at once from what was said before; the answer stays the
        same, and gets faster where it repeats its prompt or itself and a step of several tokens costs little more than
        one.

        verify hashes every file of a bundle. A checkpoint's ViT is exported once into `cache_dir`. progress gets lines.
        BundleError, CheckpointError and ConfigError name what is missing and the command that makes it; FitError comes
        before anything is allocated, with both numbers and what would fit.
        """
        say = progress or (lambda _: None)
        place = find_device(device)
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}, known are {', '.join(DTYPES)}")
        name = dtype or ("float32" if place.type == "cpu" else "float16")
        if name == "float32" and place.type == "cuda":
            raise ConfigError("dtype is 'float32', the kernels for CUDA compute in 'float16' or 'bfloat16'; pass one")
        for option, value, known in (("kv_cache", kv_cache, get_args(KVType)), ("head", head, get_args(Head))):
            if value is not None and value not in known:
                raise ConfigError(f"{option} is {value!r}, known are {', '.join(known)}")
        path = local_folder(
            path, source=source, revision=revision, local_files_only=local_files_only, progress=progress
        )
        bundle = Bundle.open(path, verify=verify) if is_bundle(path) else None
        checkpoint = bundle.checkpoint if bundle else Checkpoint(path)
        config = checkpoint.config
        if max_context is not None and not 0 < max_context <= config.max_position_embeddings:
            raise ConfigError(
                f"max_context is {max_context}, this model takes 1 to {config.max_position_embeddings} positions"
            )
        if not 0 <= lookup < CHUNK:
            raise ConfigError(f"lookup is {lookup}, 0 (off) to {CHUNK - 1} tokens can be guessed at once; 7 is usual")
        if not 1 <= slots <= MOST_SEQUENCES:
            raise ConfigError(f"slots is {slots}, a decode step takes 1 to {MOST_SEQUENCES} sequences")
        tokenizer = _tokenizer(checkpoint)
        encoding = vision_device or str(place)
        elsewhere = torch.device(encoding) != place
        memory = parse_bytes(max_memory) if max_memory is not None else free_memory(place)
        chosen, plan = choose(
            config,
            Plan(
                device=place.type,
                dtype=DTYPES[name],
                embeddings=embeddings,
                slots=slots,
                vision="elsewhere" if elsewhere else "released" if release_vision else "resident",
            ),
            profile=profile,
            memory=memory,
            where=named_with_others(place),
            vit=bundle.vit_dtype if bundle else None,
            head=head,
            kv_cache=kv_cache,
            context=max_context,
        )
        budget = estimate(config, plan)
        say(
            f"{chosen}: vision tower {plan.vit}, head {plan.head}, cache {plan.kv_cache}, {plan.context} positions; "
            f"{budget.total / 1e9:.2f} GB"
            + (f" of the {memory / 1e9:.2f} GB free on {place}" if memory is not None else "")
        )
        vit = bundle.vit if bundle else exported_vit(checkpoint, dtype=plan.vit, cache_dir=cache_dir, progress=progress)
        decoder = _load(checkpoint, plan, place, say)
        encoder = VisionEncoder(vit, config.visual, device=encoding, max_batch=plan.images, release=release_vision)
        vision = FeatureCache(encoder, config.visual.image_size)
        return cls(decoder, vision, tokenizer, checkpoint.generation, plan, lookup=lookup)

    def answer(
        self,
        query: Query,
        history: History | None = None,
        system: str = SYSTEM,
        chat_format: str | None = None,
        **generation: Any,
    ) -> Answer:
        """Answer `query`: text, or a list of {"image": …}, {"text": …}, {"ref": …, "box": …} elements.

        history holds earlier (query, response) pairs. `<img>` in text is plain text: no user's text opens anything.
        generation: options of GenerationOptions. ImageError, PromptError or ConfigError on a bad argument.
        """
        return self._finish(self.prepare(query, history, system, chat_format, **generation))

    def ask(self, images: ImageLike | Sequence[ImageLike], question: str, **generation: Any) -> Answer:
        """Answer a question about one image or a list of images."""
        several = images if isinstance(images, list | tuple) else [images]
        query: list[dict[str, Any]] = [*({"image": image} for image in several), {"text": question}]
        return self.answer(query, **generation)

    def chat(
        self, query: Query, history: History | None = None, system: str = SYSTEM, **generation: Any
    ) -> tuple[str, list[tuple[Query, str]]]:
        """(response, history with this turn), as upstream's model.chat. `<img>path</img>` in strings is an image."""
        run = self._prepare(query, history, system, "chatml", generation, markup_images=True)
        response = self._finish(run).text
        return response, [*((q, r) for q, r in history or []), (query, response)]

    def chat_stream(
        self, query: Query, history: History | None = None, system: str = SYSTEM, **generation: Any
    ) -> Iterator[str]:
        """The response as it grows: each item is all of the text so far, as upstream's model.chat_stream."""
        run = self._prepare(query, history, system, "chatml", generation, markup_images=True)
        text = ""
        for piece in self._pieces(run):
            text += piece
            yield text

    def answer_stream(
        self,
        query: Query,
        history: History | None = None,
        system: str = SYSTEM,
        chat_format: str | None = None,
        **generation: Any,
    ) -> Iterator[str | Answer]:
        """Like `answer`, but yields pieces of text as they come (never half a character), then the Answer."""
        run = self.prepare(query, history, system, chat_format, **generation)
        yield from self._pieces(run)
        yield run.answer()

    def prepare(
        self,
        query: Query,
        history: History | None = None,
        system: str = SYSTEM,
        chat_format: str | None = None,
        **generation: Any,
    ) -> Run:
        """What `answer` would run: tokens, opened images, options. For a scheduler, which runs several at once."""
        chat_format = chat_format or self.chat_format
        return self._prepare(query, history, system, chat_format, generation, markup_images=False)

    def sampler(self, run: Run) -> Sampler:
        """How `run`'s tokens are to be chosen. ConfigError if its response_format cannot be used."""
        constraint = constraint_for(
            run.options.response_format, self.tokenizer, self.config.vocab_size, run.stop_ids or frozenset({0})
        )
        if run.options.min_new_tokens:
            constraint = MinNewTokens(run.options.min_new_tokens, run.stop_ids, self.config.vocab_size, constraint)
        return Sampler(run.options, run.prompt.ids, constraint=constraint, device=self.decoder.device)

    def encode(self, run: Run) -> Inputs:
        """The prompt of `run` with its images encoded."""
        if self.plan.vision == "released" and not self.slots.sequences and not self.vision.holds(run.images):
            self.slots.unload()  # so that the tower and the cache are not there together
        encoded = self.vision.encode(run.images)
        run.cached_images, run.image_s = encoded.cached, encoded.seconds
        return Inputs(run.prompt.ids, run.prompt.image_starts, encoded.keys, encoded.features)

    def generate(self, query: Query, **generation: Any) -> Answer:
        """Continue `query` in raw format, as the base model is used. `<img>path</img>` in strings is an image."""
        return self._finish(self._prepare(query, None, "", "raw", generation, markup_images=True))

    def generate_ids(
        self, ids: list[int], image_starts: list[int], images: Sequence[ImageLike], **generation: Any
    ) -> Answer:
        """Continue token ids in raw format; the 256 slots from each of `image_starts` on receive that image."""
        prompt = Prompt(ids=ids, image_starts=image_starts, images=list(images), text="")
        return self._finish(self._run(prompt, self.options.with_overrides(generation), "raw"))

    def score(
        self, query: Query, continuation: str, history: History | None = None, *, chat_format: str | None = None
    ) -> list[float]:
        """Natural-log probability of each token of `continuation` as the answer to `query`."""
        run = self._prepare(query, history, SYSTEM, chat_format or self.chat_format, {}, markup_images=False)
        ids = self.tokenizer.encode(continuation)
        if not ids:
            raise PromptError("continuation is empty; there is nothing to score")
        self._check_context(len(run.prompt.ids) + len(ids), "the prompt and the continuation have")
        slots, inputs = self._free_slots(), self.encode(run)
        sequence = slots.begin(inputs, Sampler(run.options, inputs.ids, device=self.decoder.device))
        try:
            while (logits := slots.prefill_logits(sequence)) is None:
                pass
            chances = [logits.log_softmax(-1)]
            for first in range(0, len(ids) - 1, SCORED):
                part = ids[first : min(first + SCORED, len(ids) - 1)]
                chances.append(slots.extend(sequence, part).log_softmax(-1))
        finally:
            slots.end(sequence)
        return torch.cat(chances)[torch.arange(len(ids)), ids].tolist()

    def forget(self) -> None:
        """Drop what was kept of earlier answers, keys and values and image features: the next one starts afresh."""
        self.slots.forget()
        self.vision.forget()

    from_list_format = staticmethod(from_list_format)
    to_list_format = staticmethod(to_list_format)

    @staticmethod
    def draw_bbox_on_latest_picture(response: str, history: History | None = None) -> Image.Image | None:
        """The latest picture of `history` with the boxes of `response` drawn on it; None if there is neither."""
        picture = latest_picture(history or [])
        if picture is None:
            return None
        image = load_image(picture)
        boxes = parse_boxes(response, image_sizes=[image.size])
        return draw_boxes(image, boxes) if boxes else None

    def _prepare(
        self,
        query: Query,
        history: History | None,
        system: str,
        chat_format: str,
        generation: dict[str, Any],
        *,
        markup_images: bool,
    ) -> Run:
        options = self.options.with_overrides(generation)
        if chat_format == "chatml":
            prompt = chat_prompt(
                self.tokenizer,
                query,
                history or [],
                system,
                max_window_size=self.max_window_size,
                markup_images=markup_images,
            )
        elif chat_format == "raw":
            prompt = raw_prompt(self.tokenizer, query, markup_images=markup_images)
        else:
            raise ConfigError(f"chat_format is {chat_format!r}, known are 'chatml' and 'raw'")
        return self._run(prompt, options, chat_format)

    def _run(self, prompt: Prompt, options: GenerationOptions, chat_format: str) -> Run:
        if not prompt.ids:
            raise PromptError("the prompt is empty; give some text or an image")
        self._check_context(len(prompt.ids) + 1, "the prompt has")
        stop_ids = frozenset[int]() if options.ignore_eos else stop_token_ids(self.tokenizer, chat_format)
        room = min(options.max_new_tokens, self.max_context - len(prompt.ids))
        return Run(prompt, [load_image(image) for image in prompt.images], options, self.tokenizer, stop_ids, room)

    def _check_context(self, positions: int, what: str) -> None:
        if positions > self.max_context:
            raise PromptError(
                f"{what} {positions} tokens, room for one new one included, and the context holds {self.max_context}; "
                "shorten the text, send fewer images (258 tokens each) or raise max_context "
                f"(at most {self.config.max_position_embeddings})"
            )

    def _make_slots(self) -> Slots:
        kv_cache = torch.int8 if self.plan.kv_cache == "int8" else None
        return Slots(
            self.decoder,
            capacity=self.plan.context,
            count=self.plan.slots,
            kv_cache=kv_cache,
            lookup=self.lookup,
        )

    def _free_slots(self) -> Slots:
        """The runtime's own, or others for a stream that is begun while another one is not through."""
        return self.slots if self.slots.free else self._make_slots()

    def _pieces(self, run: Run) -> Iterator[str]:
        """Generate: pieces of text, none of them empty."""
        inputs, slots, sampler = self.encode(run), self._free_slots(), self.sampler(run)
        run.start()
        steps = generate(slots, [inputs], [sampler], stop_ids=run.stop_ids, max_new_tokens=[run.room])
        with contextlib.closing(steps):  # frees the slot at once, wherever this is left
            for (token,) in steps:
                assert token is not None  # a batch of one ends when its sequence does
                sequence = next(sequence for sequence in slots.sequences if sequence.inputs is inputs)
                run.cached_tokens = sequence.reused
                if piece := run.push(token, sequence.logprob):
                    yield piece
                if run.finish_reason:
                    return

    def _finish(self, run: Run) -> Answer:
        for _ in self._pieces(run):
            pass
        return run.answer()


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """ConfigError if it is not that of the config."""
    config, file = checkpoint.config, checkpoint.path / VOCAB_FILE
    tokenizer = Tokenizer.from_file(file)
    if tokenizer.vocab_size > config.vocab_size or tokenizer.specials["<img>"] != config.visual.image_start_id:
        raise ConfigError(
            f"{file} has {tokenizer.vocab_size} tokens with <img> at {tokenizer.specials['<img>']}, config.json has "
            f"vocab_size {config.vocab_size} and image_start_id {config.visual.image_start_id}; copy the {VOCAB_FILE} "
            "of this model"
        )
    return tokenizer


def _load(checkpoint: Checkpoint, plan: Plan, place: torch.device, say: Progress) -> QWenLMHeadModel | FusedDecoder:
    """The decoder, with a line for every tenth of it that was read, and the rate."""
    quant = checkpoint.config.quantization
    load = load_fused if place.type == "cuda" and quant is not None and quant.bits == 4 else load_decoder
    total = sum(checkpoint[name].nbytes for name in checkpoint.names if not name.startswith(VISUAL))
    began, done, shown = time.perf_counter(), 0, 0

    def count(nbytes: int) -> None:
        nonlocal done, shown
        done += nbytes
        if total > _SHOWN and done * 10 // total > shown:
            shown = done * 10 // total
            say(f"read {done / 1e9:.2f} of {total / 1e9:.2f} GB")

    decoder = load(
        checkpoint, dtype=plan.dtype, device=place, head=plan.head, embeddings=plan.embeddings, on_bytes=count
    )
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    seconds = time.perf_counter() - began
    say(f"read {done / 1e9:.2f} GB in {seconds:.1f} s, {done / seconds / 1e9:.2f} GB/s")
    return decoder
