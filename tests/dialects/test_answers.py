"""Written answers, each with what it says: the details of every dialect."""

import pytest

from fastgen_jax.dialects import DIALECTS, CallPart, CallStart, Text, Thought, Tool, make_reader
from tests.dialects.written import TOOLS, WRITERS, calls_of, grammar_of, read


def call(name: str, arguments: str = "{}", index: int = 0) -> list:
    return [CallStart(index, name), CallPart(index, arguments)]


CITY = '{"city":"Rome"}'
V3_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>ping\n```json\n{}\n```<｜tool▁call▁end｜>"
ANSWERS = {
    "hermes": [
        ("No call.", [Text("No call.")]),
        ('I look.\n\n<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>\n',
         [Text("I look."), *call("ping")]),
        ('<tool_call>{"arguments": {"city": "Rome"}, "name": "get_weather"}</tool_call> So.',
         [*call("get_weather", CITY), Text("So.")]),
        ('<tool_call>{"name": "ping"}</tool_call><tool_call>{"name":"f","arguments":null}'
         "</tool_call>", [*call("ping"), *call("f", index=1)]),
        (r'<tool_call>{"name": "f", "arguments": "{\"city\": \"Rome\"}"}</tool_call>',
         call("f", CITY)),
        ('<tool_call>{"name": "f", "arguments": {"a": [1, {"b": []}], "c": "}</tool_call>"}}'
         "</tool_call>", call("f", '{"a":[1,{"b":[]}],"c":"}</tool_call>"}')),
        ('<tool_call>{"name": "f", "arguments": {"a": "1\n2", "b": [1,],}}</tool_call>',
         call("f", r'{"a":"1\n2","b":[1]}')),
        ('a <tool_call> {"name": ping}</tool_call> b',
         [Text('a <tool_call> {"name": ping}</tool_call> b')]),
        ('<tool_call>{"name": "f", "arguments": "Rome"}</tool_call>',
         [Text('<tool_call>{"name": "f", "arguments": "Rome"}</tool_call>')]),
        ('<tool_call>{"name": "f", "arguments": {"a": nothing}} b',
         [*call("f", '{"a":'), Text(" nothing}} b")]),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_cool>', [*call("f"),
         Text("}</tool_cool>")]),
        ('<tool_call>{"name": "pi', [Text('<tool_call>{"name": "pi')]),
        ('<tool_call>{"name": "f", "arguments": {"a": "b', call("f", '{"a":"b')),
        ('<tool_call>{"name": "f", "arguments": {}}\n</tool_', call("f")),
        ("<tool_call><tool_call>{\"name\": \"f\"}</tool_call>",
         [Text("<tool_call>"), *call("f")]),
    ],
    "qwen3_coder": [
        ("<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n"
         "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
         call("get_weather", '{"city":"Rome","days":3}')),
        ("<function=get_weather><parameter=city>5</parameter><parameter=hourly>True</parameter>"
         "</function> Done", [*call("get_weather", '{"city":"5","hourly":true}'), Text("Done")]),
        ("<tool_call><function=get_weather><parameter=city>\n<b>\n\"x\"\n\n</parameter>\n"
         "<parameter=unit>null</parameter><parameter=place>{'a': 1}</parameter></function>"
         "</tool_call>",
         call("get_weather", r'{"city":"<b>\n\"x\"\n","unit":null,"place":"{'"'a': 1"r'}"}')),
        ("<tool_call>\n<function=f>\n<parameter=a>\n[1, 2]\n</parameter>\n</function></tool_call>",
         call("f", '{"a":[1,2]}')),
        ("<tool_call>\n<function=ping>\n</function>\n</tool_call>\n<tool_call>\n<function=ping>\n"
         "</function>\n</tool_call>", [*call("ping"), *call("ping", index=1)]),
        ("Write <function=f> so.", [Text("Write <function=f> so.")]),
        ("<tool_call><function=ping><parameter=a>b</param", call("ping", '{"a":')),
        ("<tool_call><function=get_weather><parameter=city>Ro</param",
         call("get_weather", '{"city":"Ro')),
    ],
    "glm45": [
        ("\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
         "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
         call("get_weather", '{"city":"Rome","days":3}')),
        ("<tool_call>ping</tool_call><tool_call>ping\n</tool_call>",
         [*call("ping"), *call("ping", index=1)]),
        ("a <tool_call> b", [Text("a <tool_call> b")]),
        ("<tool_call>ping <b>", [Text("<tool_call>ping <b>")]),
    ],
    "llama3_json": [
        ('{"name": "get_weather", "parameters": {"city": "Rome"}}', call("get_weather", CITY)),
        ('<|python_tag|>{"name": "f", "parameters": {}}', call("f")),
        ('{"type": "function", "name": "ping", "parameters": {}}; {"name": "ping", '
         '"parameters": {}}', [*call("ping"), *call("ping", index=1)]),
        ('{"name": "Ann", "parameters": 3}', [Text('{"name": "Ann", "parameters": 3}')]),
        ('So: {"name": "ping", "parameters": {}}',
         [Text('So: {"name": "ping", "parameters": {}}')]),
        ('{"name": "ping", "par', [Text('{"name": "ping", "par')]),
        (' {"answer": [1]}', [Text(' {"answer": [1]}')]),
    ],
    "mistral": [
        ('[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}, "id": "abc"}]',
         call("get_weather", CITY)),
        ('Yes.[TOOL_CALLS][{"name":"ping","arguments":{}},{"name":"f","arguments":{}}]',
         [Text("Yes."), *call("ping"), *call("f", index=1)]),
        ('[TOOL_CALLS]ping[ARGS]{}[TOOL_CALLS]get_weather[CALL_ID]a1[ARGS]{"city": "Rome"}',
         [*call("ping"), *call("get_weather", CITY, 1)]),
        ('[TOOL_CALLS]ping{"a": 1}', call("ping", '{"a":1}')),
        ("[TOOL_CALLS] []", [Text("[TOOL_CALLS] []")]),
        ('[TOOL_CALLS] [{"name": "ping", "arguments": {}}, {"name": "pi',
         [*call("ping"), Text(', {"name": "pi')]),
    ],
    "granite": [
        ('<|tool_call|>[{"name": "ping", "arguments": {}}]', call("ping")),
        ('<tool_call> [{"name": "get_weather", "arguments": {"city": "Rome"}}]\n',
         call("get_weather", CITY)),
    ],
    "phi4_mini_json": [
        ('functools[{"name": "ping", "arguments": {}}]', call("ping")),
        ('<|tool_call|>[{"name": "ping", "arguments": {}}]', call("ping")),
        ("Use functools for it.", [Text("Use functools for it.")]),
    ],
    "deepseek_v3": [
        (f"Yes.<｜tool▁calls▁begin｜>{V3_CALL}\n{V3_CALL}<｜tool▁calls▁end｜>",
         [Text("Yes."), *call("ping"), *call("ping", index=1)]),
        (f"<｜tool▁calls▁begin｜>{V3_CALL}\n", call("ping")),
        ("<｜tool▁calls▁begin｜>hm", [Text("<｜tool▁calls▁begin｜>hm")]),
        (f"<｜tool▁calls▁begin｜>{V3_CALL}<｜tool▁call▁begin｜>hm<｜tool▁sep｜>hm",
         [*call("ping"), Text("<｜tool▁call▁begin｜>hm<｜tool▁sep｜>hm")]),
    ],
    "deepseek_v31": [
        ('<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Rome"}'
         "<｜tool▁call▁end｜><｜tool▁call▁begin｜>ping<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
         "<｜tool▁calls▁end｜>", [*call("get_weather", CITY), *call("ping", index=1)]),
    ],
    "gpt_oss": [
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
         "Yes.<|return|>", [Thought("Hm."), Text("Yes.")]),
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
         'to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>',
         [Thought("Hm."), *call("get_weather", CITY)]),
        (" to=functions.ping<|channel|>commentary json<|message|>{}", call("ping")),
        ("<|channel|>commentary<|message|>First.<|end|><|start|>assistant to=functions.ping"
         "<|channel|>commentary<|message|>{}<|call|>", [Text("First."), *call("ping")]),
        ("<|channel|>final<|message|>Ye", [Text("Ye")]),
        ("Plain.", [Text("Plain.")]),
    ],
    "pythonic": [
        ("""[get_weather(city="Rome", days=3), ping()]""",
         [*call("get_weather", '{"city":"Rome","days":3}'), *call("ping", index=1)]),
        ("<|python_start|>[ping(a=[1, (2,), {'b': None}], c=True)]<|python_end|>",
         call("ping", '{"a":[1,[2],{"b":null}],"c":true}')),
        (r"""[ping(a='it\'s "x"\n\x41\u00e9', b="it's", )]""",
         call("ping", r'''{"a":"it's \"x\"\nA\u00e9","b":"it's"}''')),
        ("[1, 2]", [Text("[1, 2]")]),
        ("[print(1)]", [Text("[print(1)]")]),
        ("[ping(a=1+2)]", [*call("ping", '{"a":'), Text("1+2)]")]),
        ("[ping(a='x", call("ping", '{"a":"x')),
    ],
}  # fmt: skip
CASES = [(name, text, events) for name, cases in ANSWERS.items() for text, events in cases]


@pytest.mark.parametrize(("name", "text", "events"), CASES)
def test_an_answer_says_what_it_says(name, text, events):
    assert read(make_reader(DIALECTS[name], tools=TOOLS), text) == events


@pytest.mark.parametrize(("name", "text", "events"), CASES)
def test_it_says_the_same_character_by_character(name, text, events):
    assert read(make_reader(DIALECTS[name], tools=TOOLS), text, range(len(text))) == events


def test_arguments_are_passed_on_while_they_come():
    reader = make_reader(DIALECTS["hermes"])
    reader.feed('<tool_call>{"name": "f", "arguments": {"a": "one ')
    assert reader.feed("two") == [CallPart(0, "two")]
    assert reader.feed(' three"') == [CallPart(0, ' three"')]


HALF = r"\ud800"  # of a pair: JSON can spell it, and UTF-8 cannot


@pytest.mark.parametrize(
    ("answer", "events"),
    [
        (f'{{"name": "f", "arguments": {{"a": "{HALF}"}}}}', call("f", f'{{"a":"{HALF}"}}')),
        (rf'{{"name": "f", "arguments": "{{\"a\": \"{HALF}\"}}"}}', call("f", f'{{"a":"{HALF}"}}')),
        (f'{{"name": "{HALF}"}}', [Text(f'<tool_call>{{"name": "{HALF}"}}</tool_call>')]),
        ('{"name": ""}', [Text('<tool_call>{"name": ""}</tool_call>')]),
    ],
)
def test_what_is_read_can_be_sent(answer, events):
    found = read(make_reader(DIALECTS["hermes"]), f"<tool_call>{answer}</tool_call>")
    assert found == events
    assert all(text.encode() for event in found for text in event if isinstance(text, str))


ODD = [
    {"type": 3}, {"type": [["string"]]}, {"enum": 3}, {"anyOf": 3}, {"anyOf": ["string"]}, True,
    {"$ref": 3}, {"$ref": "#/$defs/a"}, {"$ref": "#/nowhere/at/all"}, {"const": []}, "string",
    {"allOf": [{"$ref": "#/properties/a"}] * 9},
]  # fmt: skip


@pytest.mark.parametrize("schema", ODD, ids=repr)
@pytest.mark.parametrize("name", ["qwen3_coder", "glm45"])
def test_a_schema_that_is_none_does_not_keep_an_answer_from_being_read(name, schema):
    parameters = {"properties": {"a": schema}, "required": 3, "$defs": {"a": {"anyOf": [schema]}}}
    tool = Tool("f", parameters)
    text = WRITERS[name]([("f", {"a": "x y"})])
    assert calls_of(read(make_reader(DIALECTS[name], tools=[tool]), text)) == [("f", {"a": "x y"})]
    assert grammar_of(DIALECTS[name], [tool])
    assert calls_of(read(make_reader(DIALECTS[name], tools=[Tool("f", {"properties": 3})]), text))


def test_a_parameter_may_have_several_types():
    kinds = {"anyOf": [{"$ref": "#/$defs/number"}, {"type": "string"}]}
    tool = Tool("f", {"properties": {"a": kinds}, "$defs": {"number": {"type": "integer"}}})
    for value in ("x", 5, "null", "[1]"):
        text = WRITERS["qwen3_coder"]([("f", {"a": value})])
        events = read(make_reader(DIALECTS["qwen3_coder"], tools=[tool]), text)
        assert calls_of(events) == [("f", {"a": value})]
