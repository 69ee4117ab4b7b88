"""A chat template is the operator's program, and messages are its data: neither escapes."""

import json
import time
from pathlib import Path

import pytest

from fastgen_jax.errors import CheckpointError, InvalidRequest
from fastgen_jax.tokenizer import Tokenizer
from tests import tiny_tokenizers
from tests.server.running import serving

HOSTILE = [
    "{{ cycler.__init__.__globals__ }}", "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{% for name in joiner.__init__.__globals__ %}{{ name }}{% endfor %}",
    "{% set messages[0].content = 'x' %}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
    "{% for i in range(10**9) %}x{% endfor %}", "{{ range(messages[0].content | length) }}",
    "{{ 1 // (messages | length - 1) }}", "{{ 1e308 ** 2.0 }}", "{{ undefined.missing }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]  # fmt: skip
LONG = [{"role": "user", "content": "a" * 200_000}]
PROGRAMS = ("{{ 7 * 7 }}", "{% for i in range(9) %}x{% endfor %}", "{# gone #}", "{{ messages }}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    return tiny_tokenizers.byte_level(tmp_path_factory.mktemp("template"))


@pytest.mark.parametrize("template", HOSTILE)
def test_a_template_that_reaches_out_or_explodes_is_a_refusal(directory, template):
    tokenizer = Tokenizer(directory, chat_template=template)
    started = time.perf_counter()
    with pytest.raises(InvalidRequest, match="the chat template refused: "):
        tokenizer.apply_chat_template(LONG)
    assert time.perf_counter() - started < 5


def test_the_refusal_of_a_template_is_a_400_and_the_server_goes_on(directory):
    for template in (HOSTILE[0], "{% for i in range(10**9) %}x{% endfor %}"):
        with serving(Tokenizer(directory, chat_template=template)) as up:
            answer = up.post("/v1/chat/completions", {"messages": [LONG[0] | {"content": "a"}]})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
            assert up.post("/v1/completions", {"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_a_message_says_is_never_run(directory, program):
    tokenizer = Tokenizer(directory)
    messages = [{"role": "user", "content": program, "name": program}]
    assert program in tokenizer.decode(tokenizer.apply_chat_template(messages))


def test_many_messages_take_linear_time(directory):
    """60,000 empty messages are what a body of 2 MB holds."""
    tokenizer = Tokenizer(directory)
    started = time.perf_counter()
    tokenizer.apply_chat_template([{"role": "user", "content": ""}] * 60_000)
    assert time.perf_counter() - started < 15


@pytest.fixture
def repository(tmp_path) -> Path:
    """A checkpoint whose classes are in files beside it; each leaves a trace if it is imported."""
    directory = Path(tiny_tokenizers.byte_level(tmp_path / "model"))
    for name in ("tokenization", "configuration", "modeling"):
        (directory / f"{name}_x.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w').close()")
    path = directory / "tokenizer_config.json"
    own = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X"] * 2}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    config = {"auto_map": {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"}}
    (directory / "config.json").write_text(json.dumps({"model_type": "x"} | config))
    return directory


def test_code_of_a_repository_is_not_run(repository):
    assert Tokenizer(str(repository)).vocab_size
    assert not (repository.parent / "trace").exists()


def test_nobody_is_asked_whether_code_of_a_repository_may_run(repository, monkeypatch):
    """transformers asks who sits at a terminal, and an answer of y would run it."""
    tiny_tokenizers.make_old(repository)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(CheckpointError, match=r"is the class tokenization_x\.X of its own code"):
        Tokenizer(str(repository))
    assert not (repository.parent / "trace").exists()
