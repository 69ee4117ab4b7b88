"""Command-line flags, their help and their Markdown table, generated from config dataclasses.

A flag is `--` and the field's name with dashes; its help, group and default are the field's own.
"""

import argparse
import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from fastgen_jax.config import LIBRARY, json_object
from fastgen_jax.errors import ConfigError

Field = dataclasses.Field
SUFFIXES = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20}
GROUPS = {
    "model": "model",
    "cache": "KV cache",
    "scheduler": "scheduler",
    "parallelism": "parallelism and kernels",
    "engine": "engine",
    "server": "server",
    "limits": "limits and timeouts",
    "replicas": "replicas and machines",
}


class FlagParser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError and names the nearest flag to an unknown one."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            raise ConfigError(self._unknown(unknown[0]))
        return namespace

    def _unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument {argument!r}; only the model goes without a flag"
        name = argument.split("=")[0]
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists all"
        return f"unknown flag {name}; {hint}"


def whole_number(text: str) -> int:
    """An integer, also as 32K (32 * 1024) or 32k (32 * 1000).

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    match = re.fullmatch(r"(-?\d+)([kKmM]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a whole number such as 4096 or 32K: {text!r}")
    return int(match[1]) * SUFFIXES[match[2]]


def add_flags(parser: FlagParser, config_classes: Sequence[type], *, skip: Sequence[str] = ()):
    """Adds one flag per field of `config_classes`, under the field's group."""
    groups = {}
    for field, annotation in _fields(config_classes):
        if field.name in skip:
            continue
        title = field.metadata.get("group", "engine")
        if title not in groups:
            groups[title] = parser.add_argument_group(GROUPS.get(title, title))
        groups[title].add_argument(
            flag_name(field),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=_help_text(field).replace("%", "%%"),
            **_kind(field, annotation),
        )


def build(config_class: type, namespace: argparse.Namespace) -> Any:
    """The config that the flags ask for; fields whose flag was not given keep their default."""
    given = vars(namespace)
    names = [field.name for field in dataclasses.fields(config_class)]
    values = {name: given[name] for name in names if name in given}
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def markdown(config_classes: Sequence[type], *, positional: str) -> str:
    """A Markdown table of every flag."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for field, annotation in _fields(config_classes):
        shown = "`" + _default_text(field) + "`" if _default_text(field) else ""
        name = flag_name(field)
        if field.name == positional:
            name = f"PATH`, `{name}"
        elif annotation is bool:
            name = f"{name}`, `--no-{name[2:]}"
        lines.append(f"| `{name}` | {shown} | {field.metadata.get('help', '')} |")
    return "\n".join(lines)


def arguments(options: Mapping[str, Any]) -> list[str]:
    """How the command line says that fields have these values; nothing of None, their default."""
    return [argument for name, value in options.items() for argument in _arguments(name, value)]


def _arguments(name: str, value: Any) -> Iterator[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        yield f"--{flag}" if value else f"--no-{flag}"
    elif isinstance(value, Mapping):
        yield f"--{flag}={json.dumps(value)}"
    elif isinstance(value, list | tuple | set):
        for entry in value:
            yield from _arguments(name, entry)
    elif value is not None:
        yield f"--{flag}={value}"


def flag_name(field: Field) -> str:
    return "--" + field.name.replace("_", "-")


def _fields(config_classes: Sequence[type]) -> list[tuple[Field, Any]]:
    return [
        (field, typing.get_type_hints(config_class)[field.name])
        for config_class in config_classes
        for field in dataclasses.fields(config_class)
        if field.metadata.get("group") != LIBRARY
    ]


def _default_text(field: Field) -> str:
    if isinstance(field.default, tuple):
        return " ".join(map(str, field.default))
    return "" if field.default in (None, "") else str(field.default)


def _help_text(field: Field) -> str:
    default = _default_text(field)
    return field.metadata.get("help", "") + (f" (default: {default})" if default else "")


def _kind(field: Field, annotation: Any) -> dict[str, Any]:
    """What argparse must know to read a value of type `annotation`."""
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    is_list = typing.get_origin(annotation) is tuple
    if is_list:
        annotation = typing.get_args(annotation)[0]
    kinds = [t for t in typing.get_args(annotation) or (annotation,) if t is not type(None)]
    words = [word for t in kinds for word in typing.get_args(t) if _is_literal(t)]
    (kind,) = [t for t in kinds if not _is_literal(t)]
    readers = {int: (whole_number, "N"), float: (float, "X"), str: (str, "TEXT")}
    readers[Mapping] = (json_object, "JSON")
    reader, metavar = readers[typing.get_origin(kind) or kind]
    if is_list:
        return {"action": "append", "type": reader, "metavar": field.name.upper().split("_")[-1]}
    if words:
        number = reader
        metavar = "|".join([metavar, *words])

        def reader(text: str) -> Any:
            return text if text in words else number(text)

    return {"type": reader, "metavar": metavar}


def _is_literal(annotation: Any) -> bool:
    return typing.get_origin(annotation) is typing.Literal
