"""The request bodies of OpenAI's API, with vLLM's extras: parsing, refusals, and SamplingParams.

Every check ends in an ApiError with status 400 that names the field. Nothing here allocates by an
unchecked size, and no field is dropped silently: it acts, is refused, or is warned of once.
"""

import hashlib
import logging
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fastgen_jax.engine.types import PRIORITIES
from fastgen_jax.errors import InvalidRequest
from fastgen_jax.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from fastgen_jax.server import json_body, structure
from fastgen_jax.server.errors import from_engine, invalid, unsupported
from fastgen_jax.server.structure import Structure
from fastgen_jax.server.tools import Tools, read_tools

log = logging.getLogger("fastgen_jax.server")

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
MESSAGE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content")
MAX_EFFORT = 32  # characters
OWN_KWARGS = ("tools", "add_generation_prompt", "continue_final_message")  # fields of the body
MAX_TEMPLATE_KWARGS = 64
MAX_TEMPLATE_KWARGS_BYTES = 16_384  # of all of them as JSON
MAX_EXACT = 2**53  # the largest integer up to which floats hold all of them
MAX_SALT = 256  # characters
MAX_WARNED = 100  # distinct unknown keys that are worth a log line

# Accepted because they change nothing here: bookkeeping of the caller, or hints.
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "request_id", "verbosity",
    "spaces_between_special_tokens", "detokenize", "guided_decoding_backend",
}  # fmt: skip

# Refused unless they hold the value that asks for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1, 1.0),
    "functions": (None, []),
    "function_call": (None, "none"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
    "chat_template": (None,),
    "logits_processors": (None, []),
}

SAMPLING_FIELDS = (
    "n", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "ignore_eos",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "include_stop_str_in_output",
    "skip_special_tokens",
)  # fmt: skip

# Checked before each entry is: pydantic would list what is wrong with all of them.
MAX_ENTRIES = {
    "stop": MAX_STOP_STRINGS,
    "stop_token_ids": MAX_STOP_TOKEN_IDS,
    "allowed_token_ids": MAX_ALLOWED_TOKEN_IDS,
    "bad_words": MAX_BAD_WORDS,
    "logit_bias": MAX_LOGIT_BIAS,
}

_warned: set[str] = set()

Model = TypeVar("Model", bound=BaseModel)


def _integral(value: Any) -> Any:
    """16.0 as 16: JSON has one kind of number, and some languages write each with a point. OpenAI
    and vLLM take it; a number in a string OpenAI refuses, and so do we.
    """
    is_small = isinstance(value, float) and abs(value) <= MAX_EXACT
    return int(value) if is_small and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]
Priority = Annotated[Integer, Field(ge=PRIORITIES.start, lt=PRIORITIES.stop)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(BaseModel):
    """The fields that completions and chat completions share. null means: not given."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Integer | None = None
    best_of: Integer | None = None
    max_tokens: Integer | None = None
    max_completion_tokens: Integer | None = None
    min_tokens: Integer | None = None
    temperature: float | None = None
    top_k: Integer | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: Integer | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    allowed_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    bad_words: Annotated[list[str], Field(fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Integer | None = None
    truncate_prompt_tokens: Integer | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    priority: Priority | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_whitespace_pattern: Any = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        options = self.stream_options
        return bool(options and options.include_usage and options.continuous_usage_stats)

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check_supported(self):
        """Raises ApiError for a field that asks for what this server cannot do."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options needs stream=true", "stream_options")
        if self.best_of not in (None, self.n or 1):
            raise unsupported("best_of", "leave it out or set it equal to n")
        if self.prompt_logprobs is not None and self.stream:
            raise invalid("prompt_logprobs is not for streams; leave one out", "prompt_logprobs")
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens < 1:
            raise invalid("truncate_prompt_tokens must be at least 1", "truncate_prompt_tokens")
        check_salt(self.cache_salt)
        check_extras(self.model_extra or {})

    def structure(self) -> Structure:
        """The form that the output must have."""
        return Structure({name: getattr(self, name) for name in structure.FIELDS})

    def sampling_params(
        self,
        defaults: dict[str, Any],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        """The request's parameters over the model's `defaults`.

        Raises:
            ApiError: a value out of range, naming the field.
        """
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        values = defaults | {name: value for name, value in given.items() if value is not None}
        try:
            return SamplingParams(
                **values,
                max_tokens=max_tokens,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                allowed_token_ids=None
                if self.allowed_token_ids is None
                else tuple(self.allowed_token_ids),
                bad_words=tuple(self.bad_words or ()),
                logit_bias=_logit_bias(self.logit_bias),
                structured_outputs=self.structure().params,
            )
        except InvalidRequest as error:
            raise from_engine(error) from None


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: Integer | None = None

    def prompts(self, max_prompts: int) -> list[str | list[int]]:
        """The body's prompts, each a text or a list of token ids.

        Raises:
            ApiError: none, too many, or of the wrong type.
        """
        kinds = "a string, a list of strings, or token ids"
        return entries_of(self.prompt, "prompt", kinds, max_prompts)

    @property
    def scores_echo(self) -> bool:
        """Whether the prompt's tokens come with their logprobs, as the sample's do."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def is_echo_alone(self) -> bool:
        """Whether the prompt, unscored, is all that is asked for. The engine then makes one token
        for nobody, so that the prompt is checked, and cached for those to come.
        """
        is_all = bool(self.echo) and self.output_limit == 0 and not self.min_tokens
        return is_all and self.logprobs is None and self.prompt_logprobs is None

    def to_params(self, defaults: dict[str, Any]) -> SamplingParams:
        limit = 16 if self.output_limit is None else self.output_limit
        limit = 1 if self.is_echo_alone else limit
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        n_rivals = max((n for n in asked if n is not None), default=None)
        return self.sampling_params(
            defaults, max_tokens=limit, logprobs=self.logprobs, prompt_logprobs=n_rivals
        )


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Any = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check_supported(self):
        super().check_supported()
        if len(self.reasoning_effort or "") > MAX_EFFORT:
            raise invalid(
                f"reasoning_effort has more than {MAX_EFFORT} characters", "reasoning_effort"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs=true", "top_logprobs")
        if not 0 <= (self.top_logprobs or 0) <= MAX_LOGPROBS:
            raise invalid(f"top_logprobs must be from 0 to {MAX_LOGPROBS}", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid(
                "continue_final_message excludes add_generation_prompt", "continue_final_message"
            )

    def toolbox(self) -> Tools:
        """The tools that the model may call."""
        return read_tools(self.tools, self.tool_choice, self.parallel_tool_calls)

    def template_kwargs(self) -> dict[str, Any]:
        """What the chat template is given besides messages and tools; the tokenizer knows which
        names it may not be given.
        """
        kwargs, field = dict(self.chat_template_kwargs or {}), "chat_template_kwargs"
        if len(kwargs) > MAX_TEMPLATE_KWARGS:
            raise invalid(
                f"{field} has {len(kwargs)} entries; at most {MAX_TEMPLATE_KWARGS}", field
            )
        if (n_bytes := len(orjson.dumps(kwargs))) > MAX_TEMPLATE_KWARGS_BYTES:
            raise invalid(
                f"{field} takes {n_bytes} bytes; at most {MAX_TEMPLATE_KWARGS_BYTES}", field
            )
        for name in OWN_KWARGS:
            if name in kwargs:
                raise invalid(f"{field}: {name} is a field of the body, send it there", field)
        if self.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", self.reasoning_effort)
        kwargs["add_generation_prompt"] = (
            not self.continue_final_message
            if self.add_generation_prompt is None
            else self.add_generation_prompt
        )
        if self.continue_final_message:
            kwargs["continue_final_message"] = True
        return kwargs

    def to_params(self, defaults: dict[str, Any]) -> SamplingParams:
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling_params(
            defaults,
            max_tokens=self.output_limit,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize: a prompt or messages."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    tokens: Any = None


def parse(model: type[Model], body: bytes | bytearray) -> Model:
    """The JSON `body` as a `model`.

    Raises:
        ApiError: malformed JSON, or a field of a wrong type or with too many entries.
    """
    return validated(model, json_body.load(body))


def validated(model: type[Model], values: dict[str, Any]) -> Model:
    """The values as a `model`.

    Raises:
        ApiError: a field of a wrong type or with too many entries.
    """
    for name, most in MAX_ENTRIES.items():
        value = values.get(name)
        if isinstance(value, list | dict) and len(value) > most:
            raise invalid(f"{name} has {len(value)} entries; at most {most}", name)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        raise invalid(f"{path:.100}: {first['msg']}", str(first["loc"][0])) from None


def parse_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages reduced to the keys that templates know; the tokenizer checks their content.

    Raises:
        ApiError: naming the message at fault.
    """
    if not isinstance(messages, list) or not messages:
        raise invalid("messages must be a list with at least one message", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def cache_salt(given: str | None, tenant: bytes) -> bytes:
    """What separates cached prompts: the caller's own salt within those of its tenant. No salt of
    one tenant says what one of another does: where a tenant's name ends is told by its length.
    """
    if not given and not tenant:
        return b""
    own = (given or "").encode("utf-8", "surrogatepass")
    return hashlib.sha256(len(tenant).to_bytes(2, "big") + tenant + own).digest()


def texts_of(messages: list[dict[str, Any]]) -> Iterator[str]:
    """Text of which every template renders all: no spaces around it, which some trim, and nothing
    of the assistant's, whose thoughts some leave out.
    """
    for message in messages:
        content = message["content"]
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = [part.get("text") for part in parts if isinstance(part, dict)]
        if message["role"] != "assistant":
            yield "".join(text for text in texts if isinstance(text, str)).strip()


def check_extras(extras: dict[str, Any]):
    """Refuses extras that would change the answer, warns once of unknown ones."""
    for name, value in extras.items():
        if name in UNSUPPORTED:
            if value not in UNSUPPORTED[name]:
                raise unsupported(name)
        elif name not in IGNORED and name not in _warned and len(_warned) < MAX_WARNED:
            _warned.add(name)
            log.warning("request field %.80r is unknown and ignored", name)


def check_salt(salt: str | None):
    if len(salt or "") > MAX_SALT:
        raise invalid(f"cache_salt has more than {MAX_SALT} characters", "cache_salt")


def check_token_ids(ids: list[int], vocab_size: int, param: str):
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise invalid(f"{param}: token ids must be in [0, {vocab_size})", param)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise invalid(f"{where} must be an object with role and content", "messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(f"{where}.role must be one of {', '.join(ROLES)}", "messages")
    kept = {key: message[key] for key in MESSAGE_KEYS if message.get(key) is not None}
    if message.get("reasoning") is not None:  # vLLM's newer name of it
        kept.setdefault("reasoning_content", message["reasoning"])
    return {"role": ROLES[role], "content": message.get("content"), **kept}


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float] | None:
    if not bias:
        return None
    if not all(key.isascii() and key.isdigit() and len(key) < 11 for key in bias):
        raise invalid("logit_bias: keys must be token ids", "logit_bias")
    return {int(key): value for key, value in bias.items()}


def entries_of(given: Any, field: str, kinds: str, most: int) -> list[str | list[int]]:
    """The texts and lists of token ids that a field holds, one or several.

    Args:
        kinds: what the field may be, in words.

    Raises:
        ApiError: none, too many, or of the wrong type.
    """
    if isinstance(given, str) or is_ids(given):
        return [given]
    if not isinstance(given, list) or not given:
        raise invalid(f"{field} must be {kinds}", field)
    if len(given) > most:
        raise invalid(f"{field} has {len(given)} entries; at most {most}", field)
    for index, entry in enumerate(given):
        if not (isinstance(entry, str) or is_ids(entry)):
            raise invalid(f"{field}[{index}] must be a string or token ids", field)
    return given


def is_ids(value: Any) -> bool:
    """Whether `value` is a list of plain integers (true and 1.0 are none)."""
    return isinstance(value, list) and bool(value) and set(map(type, value)) == {int}
