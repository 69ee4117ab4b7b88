"""SamplingParams: how one request's tokens are chosen, and the limits of what it may ask for.

Pooling: how an embedding is made.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, Literal, Self, get_args

from fastgen_jax.config import Idle, idle_problem, is_json_object, show
from fastgen_jax.errors import InvalidRequest

Pooling = Literal["last", "mean"]  # which final hidden states make an embedding
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024  # characters
MAX_STOP_TOKEN_IDS = 32
MAX_BAD_WORDS = 128  # each of at most MAX_STOP_LENGTH characters
MAX_ALLOWED_TOKEN_IDS = 2**20  # more than any vocabulary has
MAX_LOGIT_BIAS = 300
MAX_LOGPROBS = 20
MAX_SAMPLES = 128
MAX_BEAM_WIDTH = MAX_LOGPROBS // 2  # each beam offers twice as many tokens, of which some end it


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """The form that a request's output must have: exactly one of these. Names are vLLM's.

    Args:
        json: a JSON schema, as an object or as text; True allows any value.
        json_object: any JSON object.
        regex: a regular expression (Rust's syntax) that the whole output matches.
        choice: the output is one of these texts.
        grammar: a context-free grammar, as Lark of llguidance, or as GBNF.
        whitespace_pattern: a regular expression for the whitespace between JSON's tokens.
        disable_any_whitespace: JSON without any.

    Raises:
        InvalidRequest: none or several of them, or of the wrong type.
    """

    json: str | bool | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self):
        kinds = ("json", "json_object", "regex", "choice", "grammar")
        given = [name for name in kinds if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise _bad_structure(f"needs exactly one of {', '.join(kinds)}; got {given or 'none'}")
        types = {"json": str | bool | dict, "json_object": bool, "choice": list | tuple}
        for name in (*given, "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, types.get(name, str)):
                raise _bad_structure(f"{name} has the wrong type: {show(value)}")
        if self.choice is not None:
            object.__setattr__(self, "choice", tuple(self.choice))
            if not self.choice or not all(isinstance(text, str) for text in self.choice):
                raise _bad_structure("choice must be a list of at least one text")


class RequestOutputKind(Enum):
    """What a stream yields meanwhile; LLM.generate, like vLLM's, returns what is finished."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


# Fields that only callers of vLLM bring, with the values that ask for nothing more than is done.
IDLE: dict[str, Idle] = {
    "output_kind": RequestOutputKind,
    "spaces_between_special_tokens": bool,  # fast tokenizers put none there
    "skip_clone": bool,  # what cannot change need not be cloned
}


@dataclass(kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen; names and defaults are vLLM's.

    temperature 0 is greedy. top_k 0 or -1 keeps all tokens. `logprobs=k` returns the k most likely
    tokens of each step and the sampled one, `prompt_logprobs=k` those at each place of the prompt
    and the one that is there; with it max_tokens may be 0, to score and not to generate. Without
    `detokenize` no text is made of them. The noise depends on (seed, position) alone, never on the
    batch; logits differ between batch sizes by rounding.

    `extra_args={name: arguments}` asks for logits processors, the functions that the engine was
    given as `logits_processors`; logprobs are those of the model's own logits.

    Fields may be assigned, as vLLM's users do; `clone` checks what they hold then. An engine keeps
    the params that it gets: LLM gives it clones.

    Raises:
        InvalidRequest: a value out of range, naming the field and the range.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    structured_outputs: StructuredOutputsParams | None = None
    prompt_logprobs: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    spaces_between_special_tokens: bool = True
    extra_args: dict[str, Any] | None = None
    skip_clone: bool = False

    def __post_init__(self):
        for name, idle in IDLE.items():
            if problem := idle_problem(name, getattr(self, name), idle):
                raise InvalidRequest(problem, param=name)
        self._check_lists()
        _integer("n", self.n, 1, MAX_SAMPLES)
        if self.max_tokens is not None:
            least = 1 if self.prompt_logprobs is None else 0
            _integer("max_tokens", self.max_tokens, least, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}",
                param="min_tokens",
            )
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _logprobs("logprobs", self.logprobs)
        _logprobs("prompt_logprobs", self.prompt_logprobs)
        self._check_bias()
        self._check_extra_args()
        if isinstance(self.structured_outputs, dict):
            self.structured_outputs = _structure(self.structured_outputs)
        if self.max_tokens == 0 and (self.n > 1 or self.structured_outputs is not None):
            name = "n" if self.n > 1 else "structured_outputs"
            raise InvalidRequest(
                f"max_tokens=0 scores the prompt and generates nothing, which {name} is about; "
                "leave it out",
                param=name,
            )

    def clone(self, **changes: Any) -> Self:
        """A deep copy, but for these fields."""
        return replace(copy.deepcopy(self), **changes)

    def _check_lists(self):
        if isinstance(self.stop, str):
            self.stop = (self.stop,)
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            value = getattr(self, name)
            if value is None and name == "allowed_token_ids":
                continue
            value = () if value is None else value
            if not isinstance(value, list | tuple | set | frozenset):
                raise InvalidRequest(f"{name} must be a list, got {show(value)}", param=name)
            setattr(self, name, tuple(value))
        _texts("stop", self.stop, MAX_STOP_STRINGS)
        _texts("bad_words", self.bad_words, MAX_BAD_WORDS)
        _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        _token_ids("allowed_token_ids", self.allowed_token_ids or (), MAX_ALLOWED_TOKEN_IDS)
        if self.allowed_token_ids == ():
            raise InvalidRequest(
                "allowed_token_ids is empty, so that nothing could be said; None allows all tokens",
                param="allowed_token_ids",
            )
        if self.stop and not self.detokenize:
            raise InvalidRequest(
                "stop strings are looked for in the text, which detokenize=False leaves out; use "
                "stop_token_ids",
                param="stop",
            )

    def _check_extra_args(self):
        given = {} if self.extra_args is None else self.extra_args
        if not is_json_object(given) or not all(is_json_object(v) for v in given.values()):
            raise InvalidRequest(
                "extra_args must be a mapping of logits processors to a mapping of their "
                f"arguments, such as {{'name': {{}}}}, got {show(given)}",
                param="extra_args",
            )

    def _check_bias(self):
        bias = self.logit_bias or {}
        if not isinstance(bias, dict):
            raise InvalidRequest(
                f"logit_bias must be a mapping of token ids to numbers, got {show(bias)}",
                param="logit_bias",
            )
        if len(bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(
                f"logit_bias has {len(bias)} entries; at most {MAX_LOGIT_BIAS}", param="logit_bias"
            )
        for token, value in bias.items():
            _integer("logit_bias", token, 0, 2**31 - 1)
            _number("logit_bias", value, -100.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """A beam search; names and defaults are vLLM's. A longer text scores higher the larger
    length_penalty is: see beam_search.py.

    Raises:
        InvalidRequest: a value out of range, naming the field and the range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0

    def __post_init__(self):
        _integer("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if problem := idle_problem("temperature", self.temperature, (0.0,)):
            raise InvalidRequest(problem, param="temperature")
        _number("length_penalty", self.length_penalty, -10.0, 10.0)


def _structure(given: dict[str, Any]) -> StructuredOutputsParams:
    known = {field.name for field in fields(StructuredOutputsParams)}
    for name in given:
        if name not in known:
            raise _bad_structure(f"has no field {name!r:.80}; it has {', '.join(sorted(known))}")
    return StructuredOutputsParams(**given)


def _bad_structure(problem: str) -> InvalidRequest:
    return InvalidRequest(f"structured_outputs {problem}", param="structured_outputs")


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Raises InvalidRequest unless `value` is a finite number in [low, high] ((low, high] if
    open_low).
    """
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or not low <= value <= high or (open_low and value == low):  # nan is not in range
        bracket = "(" if open_low else "["
        raise InvalidRequest(
            f"{name} must be in {bracket}{low}, {high}], got {show(value)}", param=name
        )


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(
            f"{name} must be an integer from {low} to {high}, got {show(value)}", param=name
        )


def _logprobs(name: str, value: Any) -> None:
    if value == -1:
        raise InvalidRequest(
            f"{name} must be an integer from 0 to {MAX_LOGPROBS}, got -1: a step returns no "
            f"more than the {MAX_LOGPROBS} likeliest tokens, never the whole vocabulary",
            param=name,
        )
    if value is not None:
        _integer(name, value, 0, MAX_LOGPROBS)


def _texts(name: str, texts: Sequence[Any], most: int) -> None:
    if len(texts) > most:
        raise InvalidRequest(f"{name} has {len(texts)} strings; at most {most}", param=name)
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
            raise InvalidRequest(
                f"each {name} must be a string of 1 to {MAX_STOP_LENGTH} characters, "
                f"got {text!r:.80}",
                param=name,
            )


def _token_ids(name: str, ids: Sequence[Any], most: int) -> None:
    if len(ids) > most:
        raise InvalidRequest(f"{name} has {len(ids)} ids; at most {most}", param=name)
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < 2**31:
        return  # without a step of Python per id
    for token in ids:
        _integer(name, token, 0, 2**31 - 1)
