"""What all frozen configs share: fields that document themselves, and checks of values.

A config is validated in `__post_init__`, so that one that exists is valid. A field's help text is
part of the field (`metadata["help"]`): flags and the README's table are generated from it.
"""

import argparse
import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Any, TypeGuard

from fastgen_jax.errors import ConfigError

LIBRARY = "library"  # group of the options that are no flags
Idle = tuple[Any, ...] | type | UnionType  # values that change nothing here, or the type of all


def option(default: Any, help: str, group: str = "engine", *, hash: bool = True) -> Any:
    """A dataclass field that carries its own documentation."""
    return dataclasses.field(default=default, hash=hash, metadata={"help": help, "group": group})


def check_known(kwargs: dict[str, Any], config_class: type) -> None:
    """Raises ConfigError for keys that are no field of `config_class`, naming the nearest one."""
    check_names(kwargs, [f.name for f in dataclasses.fields(config_class)])


def check_names(names: Iterable[str], known: Sequence[str]) -> None:
    """Raises ConfigError for names that are not known, naming the nearest one."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"unknown option {name!r}{hint}")


def idle_problem(name: str, value: Any, idle: Idle) -> str | None:
    """What is wrong with an option that may only have values which change nothing here."""
    if isinstance(idle, tuple):
        is_idle, known = value in idle, " or ".join(map(repr, idle))
    else:
        is_idle, known = isinstance(value, idle), f"any {getattr(idle, '__name__', idle)}"
    return None if is_idle else f"{name}={show(value)} is not supported; it may be {known}"


def is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def is_json_object(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def json_object(text: str) -> dict[str, Any]:
    """A JSON object from the command line.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f'expected a JSON object such as {{"rope_theta": 1000000}}: {show(text)}'
        )
    return value


def show(value: Any) -> str:
    """A value in an error message; Python refuses to print integers of thousands of digits."""
    is_huge = isinstance(value, int) and value.bit_length() > 256
    return "a huge integer" if is_huge else f"{value!r:.80}"
