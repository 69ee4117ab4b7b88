"""The offline API, with vLLM's names: a list of prompts in, a list of finished texts out.

All prompts are checked before the first one runs; results come in the order of the prompts; an
interrupt cancels what its caller asked for and leaves the LLM usable. Callers in several threads
and event loops share the engine's steps: see driver.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen_jax.beam_search import BeamSearchOutput, search
from fastgen_jax.config import show
from fastgen_jax.driver import Driver
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.types import Request
from fastgen_jax.errors import ConfigError, EngineStopped, InvalidRequest
from fastgen_jax.generation import to_score
from fastgen_jax.prompts import Prompt, at_prompt, positions_of, prompt_list, text_and_ids
from fastgen_jax.results import EmbeddingRequestOutput, Logprob, RequestOutput
from fastgen_jax.sampling_params import BeamSearchParams, Pooling, SamplingParams
from fastgen_jax.tokenizer import Constrainer, Constraints, Tokenizer, has_tokenizer, needs_words
from fastgen_jax.vllm_options import (
    BEAM_SEARCHING,
    CHATTING,
    EMBEDDING,
    GENERATING,
    LOADING,
    acting,
)
from fastgen_jax.waiting import OnToken, finish, stream

if TYPE_CHECKING:
    from flax import nnx

    from fastgen_jax.engine.engine import Engine

TEMPLATE_OPTIONS = ("tools", "add_generation_prompt", "continue_final_message")

EncodedPrompt = tuple[str | None, list[int]]  # its text, if it came as one, and its ids


class LLM:
    """A model, for generation; thread-safe. `close` it, or use it in a `with` statement.

        llm = LLM("path-or-hub-id", max_model_len=2048)
        outs = llm.generate(["Once upon a time"], SamplingParams(max_tokens=64))
        print(outs[0].outputs[0].text)

    Args:
        model: directory of a Hugging Face checkpoint, or a hub id.
        options: fields of EngineConfig: dtype, max_model_len, block_size, num_kv_blocks,
            max_num_batched_tokens, max_num_seqs, tensor_parallel_size, attention_backend, seed ...
            Others of vLLM's are taken if they change nothing here, such as enforce_eager.

    Raises:
        ConfigError: an unknown option (with the nearest known one), a value that cannot work, or a
            model that is neither a directory nor a hub id.
        CheckpointError: the model's files are missing or damaged.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any):
        from fastgen_jax.checkpoints.directory import locate_tokenizer
        from fastgen_jax.engine.engine import Engine
        from fastgen_jax.progress import PhaseBars

        config = _config(options, model=_path("model", model))
        directory = locate_tokenizer(
            config.model, config.tokenizer, revision=config.revision, overrides=config.hf_overrides
        )
        path = str(directory)
        tokenizer = Tokenizer(path) if config.tokenizer or has_tokenizer(path) else None
        with contextlib.closing(PhaseBars()) as on_phase:
            engine = Engine(config, on_phase=on_phase)
        self._set(engine, tokenizer)

    @classmethod
    def from_module(
        cls,
        module: nnx.Module,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> LLM:
        """An LLM that generates with a module of fastgen_jax.models, and with its arrays: none is
        copied, unless dtype or tensor_parallel_size ask for others. What an optimizer makes of them
        later is not seen before `update_weights`.

        Args:
            tokenizer: or its directory or hub id; without one the LLM knows token ids only.
            options: as above; dtype="auto" is the module's.

        Raises:
            ConfigError: as above.
            WeightsError: arrays of the module do not fit its config, or have been deleted.
        """
        from fastgen_jax.checkpoints.directory import locate
        from fastgen_jax.engine.engine import Engine
        from fastgen_jax.progress import PhaseBars

        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = Tokenizer(str(locate(os.fspath(tokenizer), with_weights=False)))
        with contextlib.closing(PhaseBars()) as on_phase:
            engine = Engine(_config(options), on_phase=on_phase, module=module)
        return cls.from_engine(engine, tokenizer)

    @classmethod
    def from_engine(cls, engine: Engine, tokenizer: Tokenizer | None = None) -> LLM:
        """An LLM on an engine that exists; without a tokenizer it knows token ids only."""
        llm = cls.__new__(cls)
        llm._set(engine, tokenizer)
        return llm

    def _set(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._open_engine: Engine | None = engine
        self._constrainer: Constrainer | None = None
        self._driver = Driver(engine)
        if tokenizer is not None:
            engine.end_at(tokenizer.eos_token_ids)

    @property
    def engine(self) -> Engine:
        if self._open_engine is None:
            raise EngineStopped("this LLM is closed; make a new one")
        return self._open_engine

    def update_weights(self, source: Any, *, in_flight: str = "recompute") -> None:
        """Replaces weights while it runs, from any thread; Engine.update_weights says with what."""
        self.engine.update_weights(source, in_flight=in_flight)

    def sleep(self, level: int = 1) -> None:
        """Frees the device until `wake_up`, from any thread: of the KV cache and of the weights,
        which level 1 keeps on the host and level 2 drops. Prompts that come meanwhile wait: in one
        thread wake it up first. See Engine.sleep and Engine.wake_up.
        """
        self.engine.sleep(level)

    def wake_up(self) -> None:
        """Ends a sleep; after level 2 with the weights of its path, unless update_weights has
        brought others.
        """
        self.engine.wake_up()

    def close(self) -> None:
        """Closes the engine, which frees its memory; further calls raise EngineStopped, and so do
        those that wait in other threads and tasks.
        """
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

    def get_tokenizer(self) -> Any:
        """The tokenizer of transformers, for `apply_chat_template`, `encode`, `eos_token_id` ...

        A copy: its settings (padding, truncation, a chat template) are the caller's own.

        Raises:
            InvalidRequest: the model has none.
        """
        return self._users_tokenizer

    @functools.cached_property
    def _users_tokenizer(self) -> Any:
        return self._text_tokenizer("get_tokenizer").for_transformers()

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: Iterable[int] | None = None,
        on_token: OnToken | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Completes prompts; the outputs are in their order.

        Args:
            prompts: a text, a list of token ids, or several of either; lists may be any iterables.
                vLLM's dicts of `prompt` or `prompt_token_ids` are prompts too.
            sampling_params: for all prompts, or one for each; default: get_default_sampling_params.
            use_tqdm: whether to show a progress bar, or what makes it, as tqdm would.
            priority: one number for each prompt; lower ones run first.
            on_token: called in this thread as `on_token(i, new)` with each token of prompt i: what
                it adds to its sample, in the form of a CompletionOutput. The engine does not wait
                for it. What it raises cancels the call, and is raised here.
            options: vLLM's GENERATING of vllm_options.py, which change nothing.

        Raises:
            InvalidRequest: a prompt or its params cannot be served; none of the prompts was run.
            ConfigError: an unknown option.
            EngineStopped: the LLM is closed, perhaps meanwhile.
        """
        acting(options, GENERATING)
        encoded = self.encode_prompts(prompts)
        params = self._params_list(sampling_params, len(encoded))
        return self.run(encoded, params, use_tqdm, priority, on_token)

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes one prompt on the event loop that runs, as vLLM's AsyncLLM.generate does.

            async for output in llm.stream("Once upon a time", SamplingParams(max_tokens=64)):
                print(output.outputs[0].text)

        Yields whenever there is more: all that there is, or with output_kind DELTA what is new;
        FINAL_ONLY yields once. A loop that is left early and a task that is cancelled cancel the
        request; what runs elsewhere goes on.

        Raises:
            InvalidRequest, EngineStopped: as `generate`.
        """

        def read() -> tuple[str | None, Request]:
            [(text, ids)] = self.encode_prompts([prompt])
            [params] = self._params_list(sampling_params, 1)
            return text, self._request(ids, params, {}, priority)

        text, request = await asyncio.to_thread(read)  # long texts and grammars take their time
        async with contextlib.aclosing(
            stream(self._driver, self.tokenizer, request, text)
        ) as outputs:
            async for output in outputs:
                yield output

    def chat(
        self,
        messages: Iterable[dict[str, Any]] | Iterable[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: Iterable[int] | None = None,
        on_token: OnToken | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of a list of them, through the model's chat template.

        Args:
            messages: dicts with role and content, or a list of such lists.
            priority, on_token: as `generate` takes them.
            chat_template: Jinja source, instead of the model's.
            chat_template_kwargs: variables that the template reads, such as enable_thinking.
            options: tools, add_generation_prompt and continue_final_message, which are those of
                Tokenizer.apply_chat_template; vLLM's CHATTING of vllm_options.py change nothing.

        Raises:
            InvalidRequest: as `generate`, or the template refuses a conversation.
            ConfigError: an unknown option.
        """
        template = acting(options, CHATTING, TEMPLATE_OPTIONS) | (chat_template_kwargs or {})
        conversations: Any = list(messages)
        if not conversations or isinstance(conversations[0], dict):
            conversations = [conversations]
        tokenizer = self._text_tokenizer("chat")
        if chat_template is not None:
            tokenizer = tokenizer.with_template(chat_template)
        encoded = []
        for i, conversation in enumerate(conversations):
            ids = at_prompt(i, tokenizer.apply_chat_template, conversation, **template)
            encoded.append((tokenizer.decode(ids, skip_special_tokens=False), ids))
        params = self._params_list(sampling_params, len(encoded))
        return self.run(encoded, params, use_tqdm, priority, on_token)

    def beam_search(
        self, prompts: Prompt | Iterable[Prompt], params: BeamSearchParams, **options: Any
    ) -> list[BeamSearchOutput]:
        """The best continuations of each prompt; each token takes a request for each beam, whose
        known tokens the prefix cache holds.

        Args:
            prompts: as `generate` takes them.
            options: vLLM's BEAM_SEARCHING of vllm_options.py, which change nothing.

        Raises:
            InvalidRequest: a prompt cannot be served; none was run.
            ConfigError: an unknown option.
        """
        acting(options, BEAM_SEARCHING)
        encoded = [ids for _, ids in self.encode_prompts(prompts)]
        longest = SamplingParams(max_tokens=params.max_tokens)
        for i, ids in enumerate(encoded):
            at_prompt(i, self._request, ids, longest, {})
        next_token = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2 * params.beam_width)

        def likeliest(beams: list[list[int]]) -> list[dict[int, Logprob] | None]:
            outputs = self.run([(None, ids) for ids in beams], [next_token] * len(beams), False)
            found = [output.outputs[0].logprobs for output in outputs]
            return [positions[0] if positions else None for positions in found]

        results = search(encoded, params, self.engine.eos_token_ids, likeliest)
        for sequence in (s for result in results for s in result.sequences):
            if self.tokenizer is not None:
                sequence.text = self.tokenizer.decode(sequence.tokens, skip_special_tokens=False)
        return results

    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        use_tqdm: bool | Callable[..., Any] = True,
        **options: Any,
    ) -> list[EmbeddingRequestOutput]:
        """The vectors of prompts, in their order, made of the model's final hidden states.

        Args:
            prompts: as `generate` takes them.
            pooling: "last": of the last token; "mean": of all, which uses no cached prefix.
            normalize: to length 1.
            options: vLLM's EMBEDDING of vllm_options.py, which change nothing.

        Raises:
            InvalidRequest: a prompt cannot be served, or there is no such pooling; none was run.
            ConfigError: an unknown option.
        """
        acting(options, EMBEDDING)
        encoded = [ids for _, ids in self.encode_prompts(prompts)]
        requests = [Request.to_embed(ids, pooling) for ids in encoded]
        for i, request in enumerate(requests):
            at_prompt(i, self.engine.check, request)
        jobs = finish(self._driver, None, requests, use_tqdm=use_tqdm)
        return [job.embedding(is_normalized=normalize) for job in jobs]

    def score(
        self,
        prompts: Prompt | Iterable[Prompt],
        completions: Prompt | Iterable[Prompt],
        *,
        use_tqdm: bool | Callable[..., Any] = True,
    ) -> list[np.ndarray]:
        """How likely each completion's tokens are after its prompt: f32[its tokens], natural
        logarithms of probabilities, of the raw logits.

        The ids of prompt and completion are joined, as a trainer joins them. A text becomes ids by
        itself, a completion without what the tokenizer puts around texts: so its tokens do not
        depend on the prompt, though those of the joined text might differ where the two meet.

        Args:
            prompts: as `generate` takes them; of at least one token each.
            completions: texts or token ids, one for each prompt.

        Raises:
            InvalidRequest: a prompt or completion cannot be scored; none was.
            FastGenError: one was not scored after all; the message says why.
        """
        encoded = [ids for _, ids in self.encode_prompts(prompts)]
        tails = [at_prompt(i, self._completion, c) for i, c in enumerate(prompt_list(completions))]
        if len(tails) != len(encoded):
            raise InvalidRequest(f"{len(tails)} completions for {len(encoded)} prompts")
        requests = [
            at_prompt(i, self._checked, at_prompt(i, to_score, *pair))
            for i, pair in enumerate(zip(encoded, tails, strict=True))
        ]
        return [job.scores() for job in finish(self._driver, None, requests, use_tqdm=use_tqdm)]

    def hidden_states(
        self,
        prompts: Prompt | Iterable[Prompt],
        positions: Iterable[int] | Iterable[Iterable[int]] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
    ) -> list[np.ndarray]:
        """What the layers of `return_hidden_states` say at positions of prompts, f32[layers,
        positions, D]: of Hugging Face's output_hidden_states the same ones.

        Args:
            prompts: as `generate` takes them.
            positions: for all prompts, or a list for each; -1 is the last token's. Default: all.

        Raises:
            InvalidRequest: a prompt or its positions cannot be served; none was run. Or the LLM was
                made without return_hidden_states.
            FastGenError: one was not read after all; the message says why.
        """
        encoded = [ids for _, ids in self.encode_prompts(prompts)]
        requests = [
            at_prompt(i, self._checked, Request.to_read(ids, own))
            for i, (ids, own) in enumerate(
                zip(encoded, positions_of(positions, encoded), strict=True)
            )
        ]
        return [
            job.hidden_states() for job in finish(self._driver, None, requests, use_tqdm=use_tqdm)
        ]

    def _completion(self, completion: Any) -> list[int]:
        text, ids = text_and_ids(completion)
        if ids is not None:
            return ids
        assert text is not None
        return self._text_tokenizer("a text completion").encode(text, add_special_tokens=False)

    def _checked(self, request: Request) -> Request:
        self.engine.check(request)
        return request

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
        """Checked params for each prompt, which the caller's later assignments do not change."""
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params.clone()] * n_prompts
        many = list(params) if isinstance(params, Iterable) else [params]
        for p in many:
            if not isinstance(p, SamplingParams):
                raise InvalidRequest(
                    f"sampling_params are one SamplingParams or one for each prompt, not {show(p)}"
                )
        if len(many) != n_prompts:
            raise InvalidRequest(f"{len(many)} sampling_params for {n_prompts} prompts")
        return [at_prompt(i, p.clone) for i, p in enumerate(many)]

    def run(
        self,
        prompts: list[EncodedPrompt],
        params: list[SamplingParams],
        use_tqdm: bool | Callable[..., Any],
        priority: Iterable[int] | None = None,
        on_token: OnToken | None = None,
    ) -> list[RequestOutput]:
        """`generate` of encoded prompts, each with its params."""
        turns = _priorities(priority, len(prompts))
        known: dict[int, Constraints] = {}  # of params that several prompts share
        requests = [
            at_prompt(i, self._request, ids, p, known, turn)
            for i, ((_, ids), p, turn) in enumerate(zip(prompts, params, turns, strict=True))
        ]
        jobs = finish(self._driver, self.tokenizer, requests, use_tqdm=use_tqdm, on_token=on_token)
        texts = [text for text, _ in prompts]
        return [job.result(text) for job, text in zip(jobs, texts, strict=True)]

    def _request(
        self,
        ids: list[int],
        params: SamplingParams,
        known: dict[int, Constraints],
        priority: int = 0,
    ) -> Request:
        """What the engine is asked. Raises InvalidRequest if it can never be served."""
        if id(params) not in known:
            known[id(params)] = self._constraints(params)
        request = Request(ids, params, **known[id(params)]._asdict(), priority=priority)
        self.engine.check(request)
        if params.stop:
            self._text_tokenizer("a stop string")
        return request

    def _constraints(self, params: SamplingParams) -> Constraints:
        if not needs_words(params):
            return Constraints()
        if self._constrainer is None:
            tokenizer = self._text_tokenizer("a form of the output, or bad_words,")
            vocab_size = self.engine.model_config.vocab_size
            self._constrainer = Constrainer(tokenizer, vocab_size, self.engine.eos_token_ids)
        return self._constrainer.constraints(params)


def _priorities(given: Iterable[int] | None, n_prompts: int) -> list[int]:
    """One for each prompt, in whatever way they were given."""
    if given is None:
        return [0] * n_prompts
    if not isinstance(given, Iterable):
        raise InvalidRequest(f"priority is one integer for each prompt, not {show(given)}")
    priorities = list(given)
    if len(priorities) != n_prompts:
        raise InvalidRequest(f"{len(priorities)} priorities for {n_prompts} prompts")
    return priorities


def _config(options: dict[str, Any], **others: Any) -> EngineConfig:
    """Of a caller's options and ours."""
    options = acting(options, LOADING, [f.name for f in dataclasses.fields(EngineConfig)])
    if options.get("tokenizer") is not None:
        options["tokenizer"] = _path("tokenizer", options["tokenizer"])
    return EngineConfig(**options | others)


def _path(name: str, value: Any) -> str:
    """What names a directory or a repository, as text; raises ConfigError for what cannot."""
    if isinstance(value, str | os.PathLike) and (path := os.fspath(value)):
        return path
    raise ConfigError(
        f"{name} must be the directory of a Hugging Face checkpoint, or a hub id, got {show(value)}"
    )
