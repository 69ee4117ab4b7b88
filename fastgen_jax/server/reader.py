"""Reader: from a body to what it asks for. It parses, checks and tokenises.

All of that grows with what the client sends, so a large body is read beside the event loop: nothing
here touches what another thread may change.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import orjson

from fastgen_jax.errors import InvalidRequest
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.server import protocol
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.errors import ApiError, invalid
from fastgen_jax.server.formats.chat import ChatFormat
from fastgen_jax.server.formats.completion import CompletionFormat
from fastgen_jax.server.formats.format import Format
from fastgen_jax.server.formats.responses import ResponsesFormat
from fastgen_jax.server.generation import PLAIN, SILENT, Voice
from fastgen_jax.server.kept import Kept
from fastgen_jax.server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from fastgen_jax.server.protocol_responses import NAMES, ResponsesRequest, named_as_in_responses
from fastgen_jax.server.service import Service
from fastgen_jax.server.speech import Speech, speech_of
from fastgen_jax.server.tools import Tools

MAX_CHOICES = 1024  # prompts x n of one body
MAX_REPEATED = 4_000_000  # characters and ids of its prompts that one answer may repeat
MAX_LOGPROB_ENTRIES = 4_000_000  # logprobs of one answer, held until its client takes them
CUT_MARGIN = 1024  # characters kept before those of which truncate_prompt_tokens keeps the end

Body = bytes | bytearray


class Ask(NamedTuple):
    """What a body asks the engine for, and the form of the answer."""

    prompts: list[list[int]]
    params: SamplingParams
    format: Format
    is_streaming: bool
    param: str  # the field that held the prompts
    cache_salt: str | None
    priority: int
    voice: Voice = PLAIN
    form_param: str | None = None  # the field that asked for a form of the output


class Reader:
    """Reads the bodies of one service's requests. Every method raises ApiError for a bad one."""

    def __init__(self, service: Service, config: ServerConfig):
        self.service = service
        self.config = config
        self.kept = Kept()

    @functools.cached_property
    def speech(self) -> Speech:
        return speech_of(self.service.require_backend().tokenizer, self.config)

    def completion(self, body: Body) -> Ask:
        """What POST /v1/completions asks for."""
        self.service.check_queue()
        return self.completion_of(protocol.parse(CompletionRequest, body), CompletionFormat)

    def completion_of(self, spec: CompletionRequest, make_format: Callable[..., Format]) -> Ask:
        """What a completion asks for, to be answered in a form of the front end's own."""
        params = self._params(spec)
        entries = spec.prompts(self.config.max_prompts)
        self._check_choices(len(entries), params.n)
        texts = [entry for entry in entries if isinstance(entry, str)]
        if spec.truncate_prompt_tokens is None:
            self._check_texts(texts, "prompt")
        prompts = [self._prompt(entry, spec) for entry in entries]
        echo = self._echo(entries, prompts, spec, params.n) if spec.echo else None
        format = make_format(echo=echo, **self._shared(spec, params, prompts))
        voice = SILENT if spec.is_echo_alone else Voice(tells_prompt=spec.scores_echo)
        asker, stream = spec.structure().field, bool(spec.stream)
        salt, priority = spec.cache_salt, spec.priority or 0
        return Ask(prompts, params, format, stream, "prompt", salt, priority, voice, asker)

    def chat(self, body: Body) -> Ask:
        """What POST /v1/chat/completions asks for."""
        self.service.check_queue()

        def make_format(shared: dict[str, Any], params: SamplingParams, tools: Tools) -> Format:
            return ChatFormat(is_named=tools.named is not None, **shared)

        return self.conversation_of(protocol.parse(ChatRequest, body), make_format, "messages")

    def response(self, body: Body, owner: bytes) -> Ask:
        """What POST /v1/responses asks for, on behalf of the client `owner`."""
        self.service.check_queue()
        spec = protocol.parse(ResponsesRequest, body)
        spec.check_supported()
        messages = [*self.kept.messages(owner, spec.previous_response_id), *spec.messages()]

        def make_format(shared: dict[str, Any], params: SamplingParams, tools: Tools) -> Format:
            keep = functools.partial(self.kept.put, owner, messages) if spec.is_kept else None
            return ResponsesFormat(spec.echoed(params), model=shared["model"], keep=keep)

        with named_as_in_responses():
            ask = self.conversation_of(spec.to_chat(messages), make_format, "input")
        return ask._replace(form_param=NAMES.get(ask.form_param or "", ask.form_param))

    def conversation_of(
        self,
        spec: ChatRequest,
        make_format: Callable[[dict[str, Any], SamplingParams, Tools], Format],
        param: str,
    ) -> Ask:
        """What a conversation asks for, which came in the field `param`."""
        params = self._params(spec)
        self._check_choices(1, params.n)
        tools = self.speech.usable(spec.toolbox())
        messages = protocol.parse_messages(spec.messages)
        if spec.truncate_prompt_tokens is None:
            self._check_texts(["".join(protocol.texts_of(messages))], param)
        ids = self._rendered(messages, spec.template_kwargs(), tools)
        prompt = self._checked(ids, spec, param)
        structure = spec.structure()
        form = self.speech.form(structure, tools, prompt)
        params = dataclasses.replace(params, structured_outputs=form)
        format = make_format(self._shared(spec, params, [prompt]), params, tools)
        voice = self.speech.voice(tools, prompt)
        asker = "tools" if tools.must_call else structure.field
        stream, salt, priority = bool(spec.stream), spec.cache_salt, spec.priority or 0
        return Ask([prompt], params, format, stream, param, salt, priority, voice, asker)

    def tokens(self, body: Body) -> bytes:
        """The answer to POST /tokenize."""
        spec = protocol.parse(protocol.TokenizeRequest, body)
        ids = self.tokens_of(spec)
        backend = self.service.require_backend()
        reply = {"count": len(ids), "max_model_len": backend.engine.max_total_tokens, "tokens": ids}
        if spec.return_token_strs:
            reply["token_strs"] = [backend.tokenizer.token_text(id) for id in ids]
        return orjson.dumps(reply)

    def tokens_of(self, spec: protocol.TokenizeRequest) -> list[int]:
        """The token ids of a prompt or messages."""
        self.check_model(spec.model)
        if (spec.prompt is None) == (spec.messages is None):
            raise invalid("send either prompt or messages", "prompt")
        if spec.prompt is not None:
            self._check_texts([spec.prompt], "prompt")
            return self._encode(spec.prompt, spec.add_special_tokens)
        messages = protocol.parse_messages(spec.messages)
        self._check_texts(["".join(protocol.texts_of(messages))], "messages")
        opens = spec.add_generation_prompt is not False
        return self._rendered(messages, {"add_generation_prompt": opens}, Tools())

    def text(self, body: Body) -> bytes:
        """The answer to POST /detokenize."""
        spec = protocol.parse(protocol.DetokenizeRequest, body)
        self.check_model(spec.model)
        if not protocol.is_ids(spec.tokens):
            raise invalid("tokens must be a list of token ids", "tokens")
        self._check_ids(spec.tokens, "tokens")
        decode = self.service.require_backend().tokenizer.decode
        return orjson.dumps({"prompt": decode(spec.tokens, skip_special_tokens=False)})

    def check_model(self, name: str | None):
        if name is not None and name not in self.service.accepted_models:
            message = f"the model {name!r:.100} does not exist; GET /v1/models lists what is served"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _params(self, spec: CompletionRequest | ChatRequest) -> SamplingParams:
        """The checked parameters of a request for a model that is served."""
        self.check_model(spec.model)
        spec.check_supported()
        return spec.to_params(self.service.require_backend().engine.default_params)

    def _check_choices(self, n_prompts: int, n: int):
        limit = self.service.require_backend().engine.config.max_queued_requests
        if n_prompts * n > MAX_CHOICES:
            raise invalid(f"prompts times n must be at most {MAX_CHOICES}", "n")
        if n_prompts * n > limit:
            raise invalid(
                f"prompts times n is {n_prompts} x {n}, more than the {limit} samples that can "
                "ever be queued; send fewer, or raise --max-queued-requests",
                "n" if n > 1 else "prompt",
            )

    def _text_bound(self) -> int | None:
        """More bytes of text than any prompt that fits; None where there is no such number."""
        engine, tokenizer = self.service.require_backend()
        return tokenizer.longest_token and tokenizer.longest_token * engine.max_total_tokens

    def _check_texts(self, texts: Sequence[str], param: str):
        """Refuses, before the tokenizer sees it, a text that cannot fit."""
        bound, n_bytes = self._text_bound(), max((len(text.encode()) for text in texts), default=0)
        if bound is not None and n_bytes > bound:
            n_tokens = self.service.require_backend().engine.max_total_tokens
            raise ApiError(
                400,
                f"This model's maximum context length is {n_tokens} tokens, which hold at most "
                f"{bound} bytes of text. However, the {param} has {n_bytes} bytes. Please shorten "
                "it, or have truncate_prompt_tokens cut it.",
                param=param,
                code="context_length_exceeded",
            )

    def _encode(self, text: str, add_special_tokens: bool | None) -> list[int]:
        encode = self.service.require_backend().tokenizer.encode
        return encode(text, add_special_tokens=add_special_tokens is not False)

    def _rendered(
        self, messages: list[dict[str, Any]], variables: dict[str, Any], tools: Tools
    ) -> list[int]:
        render = self.service.require_backend().tokenizer.apply_chat_template
        try:
            return render(messages, tools=list(tools.shown) or None, **variables)
        except InvalidRequest as error:
            if error.param in variables:
                raise invalid(str(error), "chat_template_kwargs") from None
            raise

    def _prompt(self, entry: str | list[int], spec: CompletionRequest) -> list[int]:
        if isinstance(entry, str):
            bound = self._text_bound()
            if spec.truncate_prompt_tokens is not None and bound is not None:
                entry = entry[-bound - CUT_MARGIN :]  # characters, so no fewer bytes
            entry = self._encode(entry, spec.add_special_tokens)
        return self._checked(entry, spec, "prompt")

    def _checked(self, ids: list[int], spec: GenerationRequest, param: str) -> list[int]:
        """The prompt's ids, known to be in the vocabulary, cut at the left if asked."""
        self._check_ids(ids, param)
        n_kept = spec.truncate_prompt_tokens
        return ids if n_kept is None else ids[-n_kept:]

    def _check_ids(self, ids: list[int], param: str):
        vocab_size = self.service.require_backend().engine.model_config.vocab_size
        protocol.check_token_ids(ids, vocab_size, param)

    def _check_logprobs(self, prompts: list[list[int]], params: SamplingParams):
        """Counts those of prompts too, which every sample of them may tell."""
        n_each = 0 if params.logprobs is None else params.logprobs + 1
        n_of_prompts = 0 if params.prompt_logprobs is None else params.prompt_logprobs + 1
        n_samples, n_prompt = len(prompts) * params.n, sum(map(len, prompts))
        longest = self.service.require_backend().engine.max_total_tokens
        n_tokens = longest if params.max_tokens is None else params.max_tokens
        n_entries = n_samples * min(n_tokens, longest) * n_each
        if n_entries + params.n * n_prompt * n_of_prompts > MAX_LOGPROB_ENTRIES:
            told = f" after prompts of {n_prompt} tokens in all with {n_of_prompts}"
            raise invalid(
                f"{n_samples} samples of up to {n_tokens} tokens with {n_each} logprobs each"
                f"{told if n_of_prompts else ''} are asked for, at most {MAX_LOGPROB_ENTRIES} "
                "logprobs in all; shorten the prompts, lower max_tokens, n or the number of "
                "logprobs",
                "logprobs" if n_each else "prompt_logprobs",
            )

    def _echo(
        self,
        entries: Sequence[str | list[int]],
        prompts: list[list[int]],
        spec: CompletionRequest,
        n: int,
    ) -> list[str]:
        """The prompts as text, which every sample's answer begins with."""
        decode, echo, size = self.service.require_backend().tokenizer.decode, [], 0
        is_whole = spec.truncate_prompt_tokens is None
        for entry, prompt in zip(entries, prompts, strict=True):
            echo.append(entry if isinstance(entry, str) and is_whole else decode(prompt))
            size += n * len(echo[-1])
            _check_repeated(size, "echo")
        return echo

    def _shared(
        self,
        spec: CompletionRequest | ChatRequest,
        params: SamplingParams,
        prompts: list[list[int]],
    ) -> dict[str, Any]:
        """What the formats of both APIs are made of, within bounds."""
        self._check_logprobs(prompts, params)
        if spec.return_token_ids:
            _check_repeated(params.n * sum(map(len, prompts)), "return_token_ids")
        return {
            "model": spec.model or self.service.model_names[0],
            "tokenizer": self.service.require_backend().tokenizer,
            "include_usage": spec.include_usage,
            "continuous_usage": spec.continuous_usage,
            "logprobs": params.logprobs,
            "prompt_logprobs": spec.prompt_logprobs,
            "skip_special_tokens": params.skip_special_tokens,
            "tokens_as_ids": bool(spec.return_tokens_as_token_ids),
            "return_token_ids": bool(spec.return_token_ids),
        }


def _check_repeated(size: int, param: str):
    if size > MAX_REPEATED:
        raise invalid(
            f"{param} repeats the prompts in each of their samples, {size} characters and token "
            f"ids in all; at most {MAX_REPEATED}: send fewer prompts or a smaller n",
            param,
        )
