"""The tools that a chat offers its model, and whether it must call one: checks of what is sent."""

import re
from typing import Any, NamedTuple

import orjson

from fastgen_jax.dialects import Tool
from fastgen_jax.server.errors import ApiError, invalid

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 500_000  # of all definitions as JSON
NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
NO_PARAMETERS = {"type": "object", "properties": {}}
MODES = ("none", "auto", "required")


class Tools(NamedTuple):
    """What may be called. must_call: the answer is calls and nothing else; of the tool `named`, if
    there is such a name. is_parallel: there may be several.
    """

    offered: tuple[Tool, ...] = ()
    shown: tuple[dict[str, Any], ...] = ()  # the same, as a chat template lists them
    must_call: bool = False
    named: str | None = None
    is_parallel: bool = True


def read_tools(tools: list[Any] | None, choice: Any, is_parallel: bool | None) -> Tools:
    """The tools of a body.

    Raises:
        ApiError: one is not well formed, or the choice is of none of them; it names the field.
    """
    shown = [_shown(tool, f"tools[{i}]") for i, tool in enumerate(_bounded(tools or []))]
    names = [tool["function"]["name"] for tool in shown]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise invalid(f"tools[{i}].function.name: {name!r} is there twice", "tools")
    mode, allowed = _read_choice(choice)
    if mode == "none" or (mode == "auto" and not shown):
        return Tools()
    for name in allowed or ():
        if name not in names:
            raise invalid(
                f"tool_choice names {name!r:.80}, which tools does not list", "tool_choice"
            )
    if not shown:
        raise invalid("tool_choice needs tools to choose from; send tools", "tool_choice")
    named = allowed[0] if mode == "named" and allowed else None
    if mode != "named" and allowed is not None:
        shown = [tool for tool in shown if tool["function"]["name"] in allowed]
    return Tools(
        tuple(Tool(t["function"]["name"], t["function"]["parameters"]) for t in shown),
        tuple(shown),
        mode in ("required", "named"),
        named,
        is_parallel is not False and named is None,
    )


def _bounded(tools: list[Any]) -> list[Any]:
    if len(tools) > MAX_TOOLS:
        raise invalid(f"tools has {len(tools)} entries; at most {MAX_TOOLS}", "tools")
    n_bytes = len(orjson.dumps(tools))
    if n_bytes > MAX_TOOLS_BYTES:
        raise invalid(f"tools take {n_bytes} bytes; at most {MAX_TOOLS_BYTES}", "tools")
    return tools


def _shown(tool: Any, where: str) -> dict[str, Any]:
    """The tool with what templates and dialects read of it."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise invalid(f'{where}.type must be "function"; others are not supported', "tools")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{where}.function must be an object with a name", "tools")
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise invalid(
            f"{where}.function.name must be 1 to 128 letters, digits, _, - and dots, "
            f"got {name!r:.80}",
            "tools",
        )
    if not isinstance(description, str | None):
        raise invalid(f"{where}.function.description must be a string", "tools")
    parameters = function.get("parameters")
    if not isinstance(parameters, dict | None):
        raise invalid(f"{where}.function.parameters must be a JSON schema, an object", "tools")
    described = {} if description is None else {"description": description}
    parameters = parameters or NO_PARAMETERS
    return {"type": "function", "function": {"name": name, **described, "parameters": parameters}}


def _read_choice(choice: Any) -> tuple[str, list[str] | None]:
    """none, auto, required or named, and the names that the choice gives; None: it gives none."""
    if choice is None:
        return "auto", None
    if isinstance(choice, str) and choice in MODES:
        return choice, None
    if not isinstance(choice, dict):
        raise _no_choice()
    if choice.get("type") == "function":
        return "named", [_named(choice)]
    allowed = choice.get("allowed_tools") if choice.get("type") == "allowed_tools" else None
    tools = allowed.get("tools") if isinstance(allowed, dict) else None
    if not allowed or allowed.get("mode") not in MODES[1:] or not isinstance(tools, list):
        raise _no_choice()
    return allowed["mode"], [_named(tool) for tool in tools]


def _named(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise _no_choice()
    return name


def _no_choice() -> ApiError:
    return invalid(
        'tool_choice must be none, auto, required, {"type": "function", "function": {"name": ...}} '
        'or {"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}',
        "tool_choice",
    )
