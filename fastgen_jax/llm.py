"""The offline API, with vLLM's names: a list of prompts in, a list of finished texts out.

Steps the engine in the caller's thread. All prompts are checked before the first one runs; results
come in the order of the prompts; an interrupt cancels what runs and leaves the LLM usable.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastgen_jax.config import check_known
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.types import FinishReason, Output, Request, TokenLogprobs
from fastgen_jax.errors import EngineStopped, InvalidRequest, QueueFull
from fastgen_jax.prompts import Prompt, at_prompt, prompt_list, text_and_ids
from fastgen_jax.results import CompletionOutput, Logprob, RequestOutput
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.tokenizer import TextStream, Tokenizer, has_tokenizer

if TYPE_CHECKING:
    from fastgen_jax.engine.engine import Engine

EncodedPrompt = tuple[str | None, list[int]]  # its text, if it came as one, and its ids


class LLM:
    """A model, for generation in the caller's thread. `close` it, or use it in a `with` statement.

        llm = LLM("path-or-hub-id", max_model_len=2048)
        outs = llm.generate(["Once upon a time"], SamplingParams(max_tokens=64))
        print(outs[0].outputs[0].text)

    Args:
        model: directory of a Hugging Face checkpoint, or a hub id.
        options: fields of EngineConfig: dtype, max_model_len, block_size, num_kv_blocks,
            max_num_batched_tokens, max_num_seqs, tensor_parallel_size, attention_backend, seed ...

    Raises:
        ConfigError: an unknown option (with the nearest known one), or a value that cannot work.
        CheckpointError: the model's files are missing or damaged.
    """

    def __init__(self, model: str, **options: Any):
        from fastgen_jax.checkpoints.directory import locate
        from fastgen_jax.engine.engine import Engine
        from fastgen_jax.progress import PhaseBars

        check_known(options, EngineConfig)
        config = EngineConfig(model=model, **options)
        path = str(locate(config.tokenizer or config.model))
        tokenizer = Tokenizer(path) if has_tokenizer(path) else None
        with contextlib.closing(PhaseBars()) as on_phase:
            engine = Engine(config, on_phase=on_phase)
        self._set(engine, tokenizer)

    @classmethod
    def from_engine(cls, engine: Engine, tokenizer: Tokenizer | None = None) -> LLM:
        """An LLM on an engine that exists; without a tokenizer it knows token ids only."""
        llm = cls.__new__(cls)
        llm._set(engine, tokenizer)
        return llm

    def _set(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._open_engine: Engine | None = engine
        self._lock = threading.Lock()  # one generate at a time: it steps the engine

    @property
    def engine(self) -> Engine:
        if self._open_engine is None:
            raise EngineStopped("this LLM is closed; make a new one")
        return self._open_engine

    def close(self) -> None:
        """Closes the engine, which frees its memory; further calls raise EngineStopped."""
        if self._open_engine is not None:
            self._open_engine.close()
            self._open_engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def get_default_sampling_params(self) -> SamplingParams:
        """What generation_config.json recommends: the params of calls that bring none."""
        return SamplingParams(**self.engine.default_params)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts; the outputs are in their order.

        Args:
            prompts: a text, a list of token ids, or several of either; lists may be any iterables.
                vLLM's dicts of `prompt` or `prompt_token_ids` are prompts too.
            sampling_params: for all prompts, or one for each; default: get_default_sampling_params.

        Raises:
            InvalidRequest: a prompt or its params cannot be served; none of the prompts was run.
        """
        encoded = self.encode_prompts(prompts)
        return self.run(encoded, self._params_list(sampling_params, len(encoded)), use_tqdm)

    def chat(
        self,
        messages: Iterable[dict[str, Any]] | Iterable[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of a list of them, through the model's chat template.

        Args:
            messages: dicts with role and content, or a list of such lists.
            template_options: see Tokenizer.apply_chat_template.

        Raises:
            InvalidRequest: as `generate`, or the template refuses a conversation.
        """
        conversations: Any = list(messages)
        if not conversations or isinstance(conversations[0], dict):
            conversations = [conversations]
        tokenizer = self._text_tokenizer("chat")
        encoded = []
        for i, conversation in enumerate(conversations):
            ids = at_prompt(i, tokenizer.apply_chat_template, conversation, **template_options)
            encoded.append((tokenizer.decode(ids, skip_special_tokens=False), ids))
        return self.run(encoded, self._params_list(sampling_params, len(encoded)), use_tqdm)

    def _text_tokenizer(self, purpose: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(f"{purpose} needs a tokenizer; the model has none: use token ids")
        return self.tokenizer

    def encode_prompts(self, prompts: Any) -> list[EncodedPrompt]:
        """One or several prompts, as `generate` takes them.

        Raises:
            InvalidRequest: naming the prompt.
        """
        return [at_prompt(i, self._encode, p) for i, p in enumerate(prompt_list(prompts))]

    def _encode(self, prompt: Any) -> EncodedPrompt:
        text, ids = text_and_ids(prompt)
        if ids is None:
            assert text is not None
            ids = self._text_tokenizer("a text prompt").encode(text)
        return text, ids

    def _params_list(
        self, params: SamplingParams | Iterable[SamplingParams] | None, n_prompts: int
    ) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * n_prompts
        params = list(params)
        if len(params) != n_prompts:
            raise InvalidRequest(f"{len(params)} sampling_params for {n_prompts} prompts")
        return params

    def run(
        self, prompts: list[EncodedPrompt], params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        """`generate` of encoded prompts, each with its params."""
        requests = [Request(ids, p) for (_, ids), p in zip(prompts, params, strict=True)]
        for i, request in enumerate(requests):
            at_prompt(i, self.engine.check, request)
            if request.params.stop:
                at_prompt(i, self._text_tokenizer, "a stop string")
        with self._lock:
            generation = Generation(self.engine, self.tokenizer, requests)
            _run(generation, use_tqdm)
        return [
            RequestOutput(str(job.request_id), text, ids, [s.result() for s in job.samples])
            for job, (text, ids) in zip(generation.jobs, prompts, strict=True)
        ]


class Sample:
    """One sample as it grows."""

    def __init__(
        self, index: int, request: Request, tokenizer: Tokenizer | None, stream: TextStream | None
    ):
        self.index = index
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._stream = stream
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._wants_logprobs = request.params.logprobs is not None
        self._stop_reason: int | str | None = None
        self._error: str | None = None

    def push(self, output: Output) -> None:
        """Takes the next output; a stop string may end the sample before the engine does."""
        if output.token_id is not None:
            self._token_ids.append(output.token_id)
        if output.logprobs is not None:
            self._logprobs.append(output.logprobs)
        self._error = output.error
        end = self._stream.push(output) if self._stream else output
        self.finish_reason, self._stop_reason = end.finish_reason, end.stop_reason

    def result(self) -> CompletionOutput:
        logprobs = cumulative = None
        if self._wants_logprobs:
            positions = zip(self._token_ids, self._logprobs, strict=True)
            logprobs = [self._position(*position) for position in positions]
            cumulative = sum(position.logprob for position in self._logprobs)
        return CompletionOutput(
            index=self.index,
            text=self._stream.text if self._stream else "",
            token_ids=self._token_ids,
            cumulative_logprob=cumulative,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            error=self._error,
        )

    def _position(self, token_id: int, logprobs: TokenLogprobs) -> dict[int, Logprob]:
        """The sampled token, then the most likely ones."""
        ranks = {id: rank for rank, (id, _) in enumerate(logprobs.top, 1)}
        pairs = {token_id: logprobs.logprob} | dict(logprobs.top)
        return {
            id: Logprob(value, ranks.get(id), self._tokenizer and self._tokenizer.token_text(id))
            for id, value in pairs.items()
        }


def _samples(request: Request, tokenizer: Tokenizer | None) -> list[Sample]:
    p = request.params
    streams = [None] * p.n
    if tokenizer is not None:
        streams = TextStream.of_samples(tokenizer, [request.prompt_token_ids], p)
    return [Sample(i, request, tokenizer, stream) for i, stream in enumerate(streams)]


@dataclass
class Job:
    """A prompt on its way through the engine; request_id is None until it is submitted."""

    request: Request
    samples: list[Sample]
    request_id: int | None = None

    @property
    def is_finished(self) -> bool:
        return all(sample.finish_reason for sample in self.samples)


class Generation:
    """One call of generate: submits requests as the engine has room, and collects their outputs."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, requests: list[Request]):
        self.jobs = [Job(request, _samples(request, tokenizer)) for request in requests]
        self.n_tokens = 0
        self._engine = engine
        self._waiting = deque(self.jobs)
        self._live: dict[int, Job] = {}

    @property
    def is_finished(self) -> bool:
        return not self._waiting and not self._live

    def step(self) -> int:
        """Runs one step of the engine; returns how many prompts it finished."""
        self._submit_waiting()
        assert self._engine.has_work, f"the engine lost requests {list(self._live)}"
        return self._collect()

    def cancel(self) -> None:
        """Ends everything and lets the engine release it."""
        self._waiting.clear()
        for request_id in self._live:
            self._engine.cancel(request_id)
        while self._live and self._engine.has_work:
            self._collect()

    def _submit_waiting(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            try:
                job.request_id = self._engine.submit(job.request)
            except QueueFull:
                if not self._engine.has_work:
                    raise
                return
            self._live[job.request_id] = self._waiting.popleft()

    def _collect(self) -> int:
        n_live = len(self._live)
        for output in self._engine.step():
            job = self._live.get(output.request_id)
            if job is None or job.samples[output.index].finish_reason:
                continue
            sample = job.samples[output.index]
            sample.push(output)
            self.n_tokens += output.token_id is not None
            if sample.finish_reason and not output.finish_reason:
                self._engine.finish(output.request_id, output.index)
            if sample.finish_reason and job.is_finished:
                del self._live[output.request_id]
        return n_live - len(self._live)


def _run(generation: Generation, use_tqdm: bool) -> None:
    """Steps until all is done. Ctrl-C takes effect between steps, once everything is cancelled."""
    from tqdm import tqdm

    start = time.monotonic()
    bar = tqdm(total=len(generation.jobs), unit="prompt", miniters=0, disable=not use_tqdm)
    with bar, _deferred_interrupt() as interrupted:
        try:
            while not generation.is_finished:
                n_finished = generation.step()
                speed = generation.n_tokens / (time.monotonic() - start)
                bar.set_postfix_str(f"{speed:.1f} tokens/s", refresh=False)
                bar.update(n_finished)
                if interrupted.is_set():
                    raise KeyboardInterrupt
        except BaseException:
            generation.cancel()
            raise


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets instead of interrupting a step halfway; a second one interrupts."""
    asked = threading.Event()

    def ask(signum: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
