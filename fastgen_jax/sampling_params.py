"""SamplingParams: how one request's tokens are chosen, and the limits of what it may ask for."""

from dataclasses import dataclass, fields
from typing import Any

from fastgen_jax.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024  # characters
MAX_STOP_TOKEN_IDS = 32
MAX_LOGIT_BIAS = 300
MAX_LOGPROBS = 20
MAX_SAMPLES = 128


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
                raise _bad_structure(f"{name} has the wrong type: {_show(value)}")
        if self.choice is not None:
            object.__setattr__(self, "choice", tuple(self.choice))
            if not self.choice or not all(isinstance(text, str) for text in self.choice):
                raise _bad_structure("choice must be a list of at least one text")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen; names and defaults are vLLM's.

    temperature 0 is greedy. top_k 0 or -1 keeps all tokens. `logprobs=k` returns the k most likely
    tokens of each step and the sampled one. The noise depends on (seed, position) alone, never on
    the batch; logits differ between batch sizes by rounding.

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
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name) or ()
            if not isinstance(value, list | tuple | set | frozenset):
                raise InvalidRequest(f"{name} must be a list, got {_show(value)}", param=name)
            object.__setattr__(self, name, tuple(value))
        _integer("n", self.n, 1, MAX_SAMPLES)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
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
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_stops()
        self._check_bias()
        if isinstance(self.structured_outputs, dict):
            structure = _structure(self.structured_outputs)
            object.__setattr__(self, "structured_outputs", structure)

    def _check_stops(self):
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS}", param="stop"
            )
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise InvalidRequest(
                    f"each stop must be a string of 1 to {MAX_STOP_LENGTH} characters, "
                    f"got {text!r:.80}",
                    param="stop",
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"stop_token_ids has {len(self.stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS}",
                param="stop_token_ids",
            )
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)

    def _check_bias(self):
        bias = self.logit_bias or {}
        if not isinstance(bias, dict):
            raise InvalidRequest(
                f"logit_bias must be a mapping of token ids to numbers, got {_show(bias)}",
                param="logit_bias",
            )
        if len(bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(
                f"logit_bias has {len(bias)} entries; at most {MAX_LOGIT_BIAS}", param="logit_bias"
            )
        for token, value in bias.items():
            _integer("logit_bias", token, 0, 2**31 - 1)
            _number("logit_bias", value, -100.0, 100.0)


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
            f"{name} must be in {bracket}{low}, {high}], got {_show(value)}", param=name
        )


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(
            f"{name} must be an integer from {low} to {high}, got {_show(value)}", param=name
        )


def _show(value: Any) -> str:
    """A value in an error message; Python refuses to print integers of thousands of digits."""
    is_huge = isinstance(value, int) and value.bit_length() > 256
    return "a huge integer" if is_huge else f"{value!r:.80}"
