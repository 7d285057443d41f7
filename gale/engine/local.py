"""The engine in this process: a thread that owns the model, and the asyncio face of it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Many
from functools import partial
from pathlib import Path

import structlog
import torch

from gale.core.device import choose_compute, return_freed_memory
from gale.core.errors import ModelError
from gale.core.model_folder import model_name
from gale.engine.adapters import Adapter, BatchAdapters
from gale.engine.batcher import Batcher
from gale.engine.grammar import Grammars
from gale.engine.kv_cache import cached_tokens_that_fit
from gale.engine.options import EngineOptions
from gale.engine.outbox import Outbox
from gale.engine.pace import Pace
from gale.engine.prompts import Prompts, end_tokens
from gale.engine.reading import LabelScorer, Observer, Pool, own_pooling
from gale.engine.reply import Reply
from gale.engine.request import (
    ContextLengthError,
    Decision,
    Embeddings,
    EngineFailedError,
    EngineOverloadedError,
    EngineStats,
    Event,
    Finished,
    Pooling,
    PromptError,
    PromptScores,
    SamplingError,
    SamplingParams,
    Tools,
)
from gale.engine.sequence import Sequence
from gale.engine.speculation import Drafter, DraftModel, NgramDrafter, Speculation
from gale.engine.turns import in_turns
from gale.model import kernels
from gale.model.adapter_folder import read_adapter_layers
from gale.model.attention import PackedAttention
from gale.model.checkpoint import load_model, load_tokenizer
from gale.model.native import served_by_kernels
from gale.model.quantised import Weights, quantise
from gale.model.transformer import Decoder
from gale.text.template import ChatTemplate, Message
from gale.text.tokenizer import Tokenizer

MOST_ADAPTER_RANK = 256
# With room for fewer tokens than this nobody could be answered.
_LEAST_CACHED_TOKENS = 128
_CLOSE_SECONDS = 10.0

log = structlog.get_logger()


class LocalEngine:
    """A model in this process. Implements :class:`gale.engine.request.Reader`.

    The event loop never computes: requests travel to the engine's thread through a queue, events travel back
    through an :class:`gale.engine.outbox.Outbox`.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        model_id: str,
        end_tokens: frozenset[int] = frozenset(),
        folder: Path | None = None,
        options: EngineOptions | None = None,
        draft: Decoder | None = None,
    ) -> None:
        self._model = model
        self._draft = draft
        self._options = options = options or EngineOptions()
        context = model.config.context_length
        self._cached_tokens = options.max_cached_tokens or cached_tokens_that_fit(model, draft)
        if draft is not None and draft.config.vocabulary_size != model.config.vocabulary_size:
            raise ModelError(
                f"The draft model has {draft.config.vocabulary_size} tokens, the model {model.config.vocabulary_size}.",
                hint="A draft model needs the same vocabulary: a smaller one of the same family.",
            )
        if self._cached_tokens < min(_LEAST_CACHED_TOKENS, context):
            raise ModelError(
                f"There is memory for the keys and values of {self._cached_tokens} tokens only.",
                hint="Free some memory, or take a smaller model.",
            )
        if self._cached_tokens < context:
            log.warning("context_cut_to_memory", tokens=self._cached_tokens, model=context)
        self._tokenizer = tokenizer
        self._prompts = Prompts(
            tokenizer, vocabulary_size=model.config.vocabulary_size, context_length=self.context_length
        )
        self._model_id = model_id
        self._end_tokens = end_tokens
        self._folder = folder  # where the model came from: what its adapters are compared with
        self._adapters = BatchAdapters(model)
        self._pooling = own_pooling(folder)
        self._grammars = Grammars(tokenizer, vocabulary_size=model.config.vocabulary_size, end_tokens=end_tokens)
        self._batcher: Batcher | None = None  # the thread's, from when it has begun
        self._unfinished = 0  # this and the next are touched by the event loop only
        self._closing = False
        self._outbox = Outbox()
        self._inbox: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="gale-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        folder: Path,
        options: EngineOptions | None = None,
        *,
        weights: Weights = "bf16",
        draft: Path | None = None,
    ) -> LocalEngine:
        """Open a model folder in Hugging Face layout, and that of a smaller model that guesses ahead if there is one.

        Raises :class:`gale.core.errors.ModelError`.
        """
        compute = choose_compute()
        return_freed_memory()

        def opened(folder: Path) -> Decoder:
            model = load_model(folder, dtype=compute.dtype, device=compute.device)
            quantise(model, weights, folder)
            return model

        model, guesser = opened(folder), None if draft is None else opened(draft)
        return_freed_memory()  # of what was only in between
        tokenizer = load_tokenizer(folder, model.config)
        if tokenizer.chat_template is None:
            log.warning("model_has_no_chat_template", model=str(folder), using="a plain transcript")
        return cls(
            model,
            tokenizer,
            model_id=model_name(folder),
            end_tokens=end_tokens(folder, tokenizer),
            folder=folder,
            options=options,
            draft=guesser,
        )

    @property
    def model_id(self) -> str:
        """The name under which the model is served."""
        return self._model_id

    @property
    def folder(self) -> Path | None:
        """The model folder that this came from, None where there is none."""
        return self._folder if self._folder is not None and self._folder.is_dir() else None

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that can be asked for."""
        return self._adapters.names

    def load_adapter(self, name: str, folder: Path) -> None:
        """Serve the adapter ``folder``, Gale's or PEFT's, under ``name``, in the place of one of that name if any.

        Running requests go on; may be called from any thread. Raises :class:`ModelError` for an adapter that does not
        belong to this model, see :func:`gale.model.adapter_folder.read_adapter_layers`.
        """
        if not name or name == self._model_id:
            raise ModelError(f"An adapter cannot be called {name!r}.", hint="Give it a name of its own.")
        layers = read_adapter_layers(folder, self._model, base=self.folder, most_rank=MOST_ADAPTER_RANK)
        template, ends = self._prompts.of_adapter(folder)
        self._adapters.add(Adapter(name, layers, template, self._end_tokens | ends))

    def unload_adapter(self, name: str) -> None:
        """Take no more requests for an adapter; its memory is freed when the last one that runs has ended.

        Raises :class:`gale.engine.request.UnknownAdapterError`.
        """
        self._adapters.remove(name)

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together: the model's own limit, or what there is memory for."""
        return min(self._model.config.context_length, self._cached_tokens)

    def count_prompt_tokens(
        self, messages: list[Message], tools: Tools | None = None, *, adapter: str | None = None
    ) -> int:
        """See :meth:`gale.engine.request.Engine.count_prompt_tokens`."""
        return len(self._prompts.encode_chat(messages, tools, self._template_of(self._adapters.get(adapter))))

    def encode(self, text: str) -> list[int]:
        """See :meth:`gale.engine.request.Engine.encode`."""
        return self._prompts.encode(text)

    def token_bytes(self, token: int, *, control_tokens: bool = False) -> bytes:
        """See :meth:`gale.engine.request.Engine.token_bytes`."""
        return self._prompts.token_bytes(token, control_tokens=control_tokens)

    async def chat(
        self, messages: list[Message], sampling: SamplingParams, tools: Tools | None = None
    ) -> AsyncGenerator[Event, None]:
        """See :meth:`gale.engine.request.Engine.chat`."""
        adapter = self._adapters.get(sampling.adapter)
        template = self._template_of(adapter)
        prompt = await asyncio.to_thread(self._prompts.encode_chat, messages, tools, template)
        reply = Reply(template.source, self._tokenizer, prompt, sampling, tools)
        events = self._run(prompt, reply.sampling, reply=reply)
        try:
            async for event in events:
                assert not isinstance(event, PromptScores), "not asked for"
                for part in reply.events(event):
                    yield part
        finally:
            await events.aclose()

    def complete(self, prompt: list[int], sampling: SamplingParams) -> AsyncGenerator[PromptScores | Event, None]:
        """See :meth:`gale.engine.request.Engine.complete`."""
        self._prompts.check(prompt)
        return self._run(prompt, sampling)

    @property
    def embedding_size(self) -> int:
        """See :meth:`gale.engine.request.Reader.embedding_size`."""
        return self._model.config.hidden_size

    def encode_chat(self, messages: list[Message], *, adapter: str | None = None) -> list[int]:
        """See :meth:`gale.engine.request.Reader.encode_chat`."""
        return self._prompts.encode_chat(messages, template=self._template_of(self._adapters.get(adapter)))

    def encode_text(self, text: str) -> list[int]:
        """See :meth:`gale.engine.request.Reader.encode_text`."""
        return self._prompts.encode_text(text)

    async def embed(
        self,
        inputs: Many[str | list[int]],
        *,
        pooling: Pooling | None = None,
        normalise: bool = True,
        dimensions: int | None = None,
        adapter: str | None = None,
    ) -> Embeddings:
        """See :meth:`gale.engine.request.Reader.embed`."""
        if dimensions is not None and not 1 <= dimensions <= self.embedding_size:
            raise PromptError(f"This model's vectors have {self.embedding_size} dimensions.")
        texts = await asyncio.to_thread(
            lambda: [text if isinstance(text, list) else self.encode_text(text) for text in inputs]
        )
        pools = [Pool(pooling or self._pooling) for _ in texts]
        for text in texts:
            self._prompts.check(text)
        await in_turns([partial(self._read, text, adapter, pool) for text, pool in zip(texts, pools, strict=True)])
        vectors = [pool.vector(normalise=normalise, dimensions=dimensions) for pool in pools]
        return Embeddings(vectors, sum(map(len, texts)))

    async def decide(self, prompt: list[int], labels: Many[str], *, adapter: str | None = None) -> Decision:
        """See :meth:`gale.engine.request.Reader.decide`."""
        self._prompts.check(prompt)
        ways = await asyncio.to_thread(lambda: [self._tokenizer.encode(label) for label in labels])
        if not all(ways) or len({tuple(way) for way in ways}) != max(1, len(ways)):
            raise PromptError("There must be at least one label, and each must have a text of its own.")
        scorer = await asyncio.to_thread(LabelScorer, len(prompt), ways, self._model.logits)
        if (longest := len(prompt) + scorer.further_tokens) > self.context_length:
            raise ContextLengthError(longest, self.context_length)
        await self._read(prompt, adapter, scorer)
        return Decision(scorer.logprobs(), len(prompt) + scorer.label_tokens)

    @torch.inference_mode()
    def log_likelihood(self, tokens: list[int]) -> float:
        """See :meth:`gale.engine.request.SelfTested.log_likelihood`."""
        device = self._model.embed_tokens.weight.device
        ids = torch.tensor(tokens, device=device)
        attention = PackedAttention([len(tokens) - 1], device, config=self._model.config)
        hidden_ND = self._model(ids[:-1], torch.arange(len(tokens) - 1, device=device), attention)
        logprobs_NV = self._model.logits(hidden_ND).float().log_softmax(-1)
        return float(logprobs_NV.gather(1, ids[1:, None]).sum())

    async def _read(self, prompt: list[int], adapter: str | None, observer: Observer) -> None:
        """Show ``observer`` a prompt as the model reads it; nothing is written."""
        async for _ in self._run(prompt, SamplingParams(max_tokens=0, adapter=adapter), observer=observer):
            pass

    async def _run(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        observer: Observer | None = None,
        reply: Reply | None = None,
    ) -> AsyncGenerator[PromptScores | Event, None]:
        room = self.context_length - len(prompt)
        if room < (0 if sampling.max_tokens == 0 else 1):
            raise ContextLengthError(len(prompt), self.context_length)
        vocabulary = self._model.config.vocabulary_size
        if any(not 0 <= token < vocabulary for token, _ in sampling.logit_bias):
            raise SamplingError("logit_bias", f"This model's tokens are numbered from 0 to {vocabulary - 1}.")
        constraint = None
        if sampling.grammar is not None and not self._closing:
            constraint = await self._grammars.matcher(sampling.grammar, reply.thinking if reply else None)
        most = self._options.max_unfinished
        if self._unfinished >= most:
            raise EngineOverloadedError(f"{most} requests are being answered or wait already; try again later.")
        if self._closing or not self._thread.is_alive():
            raise EngineFailedError("The engine has stopped.")
        adapter = self._adapters.get(sampling.adapter)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[PromptScores | Event | Exception] = asyncio.Queue()
        sequence = Sequence(
            prompt,
            sampling,
            room=room,
            end_tokens=self._end_tokens if adapter is None else adapter.end_tokens,
            stream=self._tokenizer.stream(reply.shown if reply else None),
            emit=partial(self._outbox.put, loop, events.put_nowait),
            constraint=constraint,
            adapter=adapter,
            observer=observer,
        )
        self._unfinished += 1
        self._inbox.put(sequence)
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            sequence.cancelled = True  # seen at the beginning of the next step
            self._unfinished -= 1
            if sampling.progress is not None:
                sampling.progress.usage = sequence.usage

    def _template_of(self, adapter: Adapter | None) -> ChatTemplate:
        return self._prompts.template if adapter is None else adapter.template or self._prompts.template

    def stats(self) -> EngineStats:
        """See :meth:`gale.engine.request.Watched.stats`."""
        return self._batcher.stats() if self._batcher else EngineStats(0, 0, 0, 0, self._cached_tokens)

    async def close(self) -> None:
        """Stop all requests and the thread."""
        self._closing = True
        self._grammars.close()
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join, _CLOSE_SECONDS)

    def _work(self) -> None:
        """The thread: take in requests, step while there is work, sleep while there is none."""
        threads = torch.get_num_threads()
        if served_by_kernels(self._model):
            kernels.threads()  # counted before torch has fewer
            # The kernels have threads of their own. Torch's would keep a processor busy with waiting after every small
            # operation that they share, just when the kernels want it: measured, a third of the time of a step.
            torch.set_num_threads(1)
        try:
            self._serve()
        finally:
            torch.set_num_threads(threads)

    def _serve(self) -> None:
        drafter: Drafter | None = NgramDrafter() if self._options.ngram_drafts else None
        if self._draft is not None:
            drafter = DraftModel(self._draft)
        self._batcher = batcher = Batcher(
            self._model,
            adapters=self._adapters,
            max_running=self._options.max_running,
            max_cached_tokens=self._cached_tokens,
            prefill_chunk=self._options.prefill_chunk,
            pace=Pace(self._options.prefill_chunk),
            prefix_cache=self._options.prefix_cache,
            speculation=None if drafter is None else Speculation(drafter),
        )
        while True:
            try:
                sequence = self._inbox.get(block=batcher.idle)
                while True:
                    if sequence is None:
                        batcher.abandon(EngineFailedError("The engine was stopped."))
                        self._outbox.send()
                        return
                    batcher.add(sequence)
                    sequence = self._inbox.get(block=False)
            except queue.Empty:
                pass
            try:
                batcher.step()
            except Exception as error:  # one broken step must not end the service
                # First the waiting, then the log: should even that fail, nobody waits for ever.
                batcher.abandon(EngineFailedError("The engine failed while answering; the request was not finished."))
                log.exception("engine_step_failed", error=str(error))
            finally:
                self._outbox.send()
