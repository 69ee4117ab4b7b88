"""Answers as models write them, and what readers make of them."""

import json
from collections.abc import Sequence

from hypothesis import strategies as st

from fastgen_jax.dialects import CallPart, CallStart, Dialect, Event, Reader, Text, Thought, Tool

TOOL = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "hourly": {"type": "boolean"},
            "place": {"type": "object", "properties": {"at": {"type": "array"}}},
            "unit": {"type": ["string", "null"]},
        },
        "required": ["city"],
    },
)
PING = Tool("ping", {"type": "object", "properties": {}})
TOOLS = (TOOL, PING)
Calls = list[tuple[str, dict]]


def grammar_of(
    dialect: Dialect, tools: Sequence[Tool], *, parallel: bool = False, literal=json.dumps
) -> str:
    """A Lark grammar of calls of these tools and nothing else."""
    return f"%llguidance {{}}\nstart: calls\n{dialect.write(tools, parallel, literal)}"


def read(reader: Reader, text: str, cuts: Sequence[int] = ()) -> list[Event]:
    """The joined events of a text that arrives in pieces."""
    ends = [*sorted(cuts), len(text)]
    events: list[Event] = []
    for start, end in zip([0, *ends], ends, strict=False):
        events += reader.feed(text[start:end])
    return joined([*events, *reader.close()])


def joined(events: list[Event]) -> list[Event]:
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        is_start = isinstance(event, CallStart)
        if last is not None and not is_start and (*event[:-1], type(event)) == (
            *last[:-1], type(last),
        ):  # fmt: skip
            found[-1] = type(event)(*event[:-1], last[-1] + event[-1])
        else:
            found.append(event)
    return found


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def thought_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Thought))


def calls_of(events: list[Event]) -> Calls:
    """Names and arguments; the arguments of a call that was cut are no JSON, and raise."""
    names = [event.name for event in events if isinstance(event, CallStart)]
    parts = [""] * len(names)
    for event in events:
        if isinstance(event, CallPart):
            parts[event.index] += event.arguments
    return [(name, json.loads(part)) for name, part in zip(names, parts, strict=True)]


# --- how each dialect writes calls: (name, arguments) pairs to text


def hermes(calls: Calls) -> str:
    return "\n".join(f"<tool_call>\n{_object(*call)}\n</tool_call>" for call in calls)


def qwen3_coder(calls: Calls) -> str:
    def one(name, arguments):
        inner = "".join(
            f"<parameter={key}>\n{_plain(value)}\n</parameter>\n"
            for key, value in arguments.items()
        )
        return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"

    return "\n".join(one(*call) for call in calls)


def glm45(calls: Calls) -> str:
    def one(name, arguments):
        inner = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{_plain(value)}</arg_value>\n"
            for key, value in arguments.items()
        )
        return f"<tool_call>{name}\n{inner}</tool_call>"

    return "\n".join(one(*call) for call in calls)


def llama3_json(calls: Calls) -> str:
    return "; ".join(_object(*call, key="parameters") for call in calls)


def mistral(calls: Calls) -> str:
    return f"[TOOL_CALLS] [{', '.join(_object(*call) for call in calls)}]"


def mistral_args(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)


def granite(calls: Calls) -> str:
    return f"<|tool_call|>[{', '.join(_object(*call) for call in calls)}]"


def phi4_mini_json(calls: Calls) -> str:
    return f"functools[{', '.join(_object(*call) for call in calls)}]"


def deepseek_v3(calls: Calls) -> str:
    inner = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json.dumps(arguments)}\n"
        "```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def deepseek_v31(calls: Calls) -> str:
    inner = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json.dumps(arguments)}<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def gpt_oss(calls: Calls) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        f"{json.dumps(arguments)}<|call|>"
        for name, arguments in calls
    )


def pythonic(calls: Calls) -> str:
    def one(name, arguments):
        inner = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        return f"{name}({inner})"

    return f"[{', '.join(one(*call) for call in calls)}]"


def _object(name: str, arguments: dict, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


def _plain(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


WRITERS = {
    "hermes": hermes,
    "qwen3_coder": qwen3_coder,
    "glm45": glm45,
    "llama3_json": llama3_json,
    "mistral": mistral,
    "mistral_args": mistral_args,
    "granite": granite,
    "phi4_mini_json": phi4_mini_json,
    "deepseek_v3": deepseek_v3,
    "deepseek_v31": deepseek_v31,
    "gpt_oss": gpt_oss,
    "pythonic": pythonic,
}
CLOSINGS = ("</parameter>", "</arg_value>")

# --- calls that fit TOOLS

texts = st.text(
    st.one_of(
        st.sampled_from('"\\{}[]()<>|,:=/\n\t\r\0 ;#é漢😀\'n'),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=12,
) | st.sampled_from(
    ["</tool_call>", "<tool_call>", "[TOOL_CALLS]", "```", "<|call|>", "}}", "5", "null", " true ",
     "</function>", "<｜tool▁call▁end｜>", "<|python_tag|>{", "\\u0041", "</think>", "<param"]
)  # fmt: skip
numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
arguments = st.fixed_dictionaries(
    {"city": texts},
    optional={
        "days": st.integers(),
        "hourly": st.booleans(),
        "place": st.dictionaries(texts, values, max_size=2),
        "unit": st.none() | st.sampled_from(["C", "F", "", "5"]),
    },
).filter(lambda found: not any(closing in found["city"] for closing in CLOSINGS))
calls = st.one_of(st.tuples(st.just("get_weather"), arguments), st.just(("ping", {})))
