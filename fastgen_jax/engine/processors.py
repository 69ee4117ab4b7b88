"""Logits processors: functions of the caller's that change logits, compiled into the step.

    def boost(logits, known, *, token=0, by=0.0):  # f32[V], Known -> f32[V]
        return logits.at[token].add(by)

A function sees one row; `process` maps it over the rows that ask for it. Its keyword arguments are
a request's: their defaults fix shapes and dtypes, so that no request compiles anything. They reach
the device as tables, a line per row, when a request brings some.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from fastgen_jax.config import show
from fastgen_jax.errors import ConfigError, InvalidRequest
from fastgen_jax.sampling_params import SamplingParams

MAX_PROCESSORS = 31  # those that a row asks for are bits of one int32
DTYPES = {"b": np.bool_, "i": np.int32, "u": np.int32, "f": np.float32}  # by kind
FORM = "(logits, known, *, name=default ...) -> logits"


class Known(NamedTuple):
    """What a processor knows of its row: the prompt's tokens, then the output's so far."""

    token_ids: Int[Array, "M"]  # -1 from n_tokens on
    n_prompt: Int[Array, ""]
    n_tokens: Int[Array, ""]


class Processor(NamedTuple):
    name: str
    function: Callable[..., Array]
    defaults: dict[str, np.ndarray]  # of its keyword arguments

    def arguments(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """All of a request's, as this processor takes them. Raises InvalidRequest."""
        for name in given:
            if name not in self.defaults:
                known = ", ".join(self.defaults) or "none"
                raise _bad(f"{self.name!r} has no argument {name!r:.80}; it has {known}")
        read = {name: self._argument(name, value) for name, value in given.items()}
        return self.defaults | read

    def _argument(self, name: str, value: Any) -> np.ndarray:
        default = self.defaults[name]
        wanted = f"argument {name!r} of {self.name!r} must be {_form(default)}"
        try:
            array = np.asarray(value)
            read = array.astype(default.dtype)
        except (TypeError, ValueError, OverflowError):
            raise _bad(f"{wanted}, got {show(value)}") from None
        if array.shape != default.shape or array.dtype.kind not in KINDS[default.dtype.kind]:
            raise _bad(f"{wanted}, got {_form(array)}")
        if default.dtype.kind == "i" and not np.array_equal(array, read):
            raise _bad(f"{wanted}, got {show(value)}")
        return read


KINDS = {"b": "b", "i": "iu", "f": "iuf"}  # what may be given for what is wanted


def _form(array: np.ndarray) -> str:
    return f"{array.dtype.name}[{', '.join(map(str, array.shape))}]"


def _bad(problem: str) -> InvalidRequest:
    return InvalidRequest(f"extra_args: {problem}", param="extra_args")


def read_processors(
    given: Mapping[str, Callable[..., Any]] | None, vocab_size: int, max_tokens: int
) -> tuple[Processor, ...]:
    """Those of EngineConfig.logits_processors, each tried on the shapes that it will see.

    Raises:
        ConfigError: one of them is no function of this form, or returns something else.
    """
    processors = tuple(_read(name, function) for name, function in (given or {}).items())
    if len(processors) > MAX_PROCESSORS:
        raise ConfigError(f"{len(processors)} logits_processors; at most {MAX_PROCESSORS}")
    for processor in processors:
        _try(processor, vocab_size, max_tokens)
    return processors


def _read(name: str, function: Callable[..., Any]) -> Processor:
    parameters = list(inspect.signature(function).parameters.values())
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    if len(parameters) - len(keywords) != 2 or any(p.default is p.empty for p in keywords):
        raise ConfigError(
            f"logits_processors[{name!r}] must have the form {FORM}, where defaults fix shapes and "
            f"dtypes; it has {inspect.signature(function)}"
        )
    defaults = {}
    for p in keywords:
        array = np.asarray(p.default)
        if array.dtype.kind not in DTYPES:
            raise ConfigError(
                f"logits_processors[{name!r}]: the default of {p.name!r} must be a bool, number or "
                f"array of them, got {show(p.default)}"
            )
        defaults[p.name] = array.astype(DTYPES[array.dtype.kind])
    return Processor(name, function, defaults)


def _try(processor: Processor, vocab_size: int, max_tokens: int) -> None:
    def absent(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    counts = absent((), jnp.int32), absent((), jnp.int32)
    known = Known(absent((max_tokens,), jnp.int32), *counts)
    arguments = {name: absent(a.shape, a.dtype) for name, a in processor.defaults.items()}
    logits, place = absent((vocab_size,), jnp.float32), f"logits_processors[{processor.name!r}]"
    try:
        found = jax.eval_shape(processor.function, logits, known, **arguments)
    except Exception as error:  # of the caller's function, whatever it is
        raise ConfigError(f"{place} cannot be traced: {type(error).__name__}: {error}") from error
    if found != logits:
        raise ConfigError(f"{place} must return float32[{vocab_size}], got {found}")


def check_arguments(params: SamplingParams, processors: Iterable[Processor]) -> None:
    """Raises InvalidRequest unless extra_args name processors, and arguments that these take."""
    by_name = {processor.name: processor for processor in processors}
    for name, given in (params.extra_args or {}).items():
        if name not in by_name:
            known = ", ".join(by_name) or "none: LLM(..., logits_processors={name: function})"
            raise _bad(f"no logits processor {name!r:.80}; the engine has {known}")
        by_name[name].arguments(given)


class ArgumentTables:
    """The processors' arguments on the host: "R ..." each, a line for each row."""

    def __init__(self, processors: tuple[Processor, ...], n_rows: int):
        self._processors = processors
        self.lines = {
            p.name: {name: np.zeros((n_rows, *a.shape), a.dtype) for name, a in p.defaults.items()}
            for p in processors
        }

    def enter(self, row: int, params: SamplingParams) -> int:
        """Writes a row's arguments; the bits of the processors that it asks for."""
        asked = 0
        for i, processor in enumerate(self._processors):
            given = (params.extra_args or {}).get(processor.name)
            if given is not None:
                asked |= 1 << i
                for name, value in processor.arguments(given).items():
                    self.lines[processor.name][name][row] = value
        return asked


def process(
    processors: tuple[Processor, ...],
    logits: Float[Array, "S V"],
    asked: Int[Array, "S"],
    known: Known,
    arguments: dict[str, dict[str, Array]],
    rows: Int[Array, "S"],
) -> Float[Array, "S V"]:
    """Logits as the rows' processors leave them, in the order in which the engine got these.

    Args:
        asked: the bits of the processors that a row wants; one that no row wants is skipped.
        known: of each row.
        arguments: "R ..." each.
    """
    for i, processor in enumerate(processors):
        is_asked = (asked >> i) & 1 != 0

        def change(before, processor=processor, is_asked=is_asked):
            own = {
                name: jnp.take(lines, rows, axis=0, mode="clip")
                for name, lines in arguments[processor.name].items()
            }
            after = jax.vmap(lambda row, known, own: processor.function(row, known, **own))(
                before, known, own
            )
            return jnp.where(is_asked[:, None], after, before)

        with jax.named_scope(f"processor_{i}"):
            logits = lax.cond(jnp.any(is_asked), change, lambda before: before, logits)
    return logits
