"""Hostile forms end within bounds, as a refusal; what follows is served."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from fastgen_jax.errors import InvalidRequest
from fastgen_jax.grammar import MAX_SHOWN
from fastgen_jax.sampling_params import StructuredOutputsParams as Form
from fastgen_jax.server.trial import Trial
from fastgen_jax.tokenizer import Tokenizer

FINE = Form(regex="[ab]+")
ENDLESS = Form(json={"type": "array", "prefixItems": [{"allOf": [
    {"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}]})  # fmt: skip
DEEP = '{"items":' * 5000 + "{}" + "}" * 5000
HOSTILE = {
    "a product of patterns": Form(
        json={"allOf": [{"type": "string", "pattern": f"a{{{i}}}"} for i in range(1, 60)]}
    ),
    "choices": Form(choice=tuple(f"w{i}" for i in range(200_000))),
    "a deep schema": Form(json=DEEP),
    "a large schema": Form(json={"enum": [f"{i:x<1000}" for i in range(2000)], "not": {}}),
    "what many steps derive": Form(grammar="start: s\ns: " + "s " * 300_000),
    "a name as long as the message": Form(json={"type": "x" * 100_000}),
}  # fmt: skip


def make(tokenizer: Tokenizer) -> Trial:
    return Trial(tokenizer.as_json, tokenizer.vocab_size + 5, [tokenizer.eos_token_id or 1])


@pytest.fixture(scope="module")
def trial(tokenizer) -> Iterator[Trial]:
    trial = make(tokenizer)
    yield trial
    trial.close()


def pid_of(trial: Trial) -> int:
    assert trial._process
    return trial._process.pid


def is_left(pid: int) -> bool:
    """Whether the process runs, or is a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def refusal(trial: Trial, form: Form) -> str:
    with pytest.raises(InvalidRequest, match=r"^structured_outputs ") as caught:
        trial.grammar_text(form)
    assert caught.value.param == "structured_outputs"
    return str(caught.value)


def test_what_passes_is_what_the_library_would_compile(trial):
    assert "[ab]+" in trial.grammar_text(FINE)


@pytest.mark.parametrize("form", HOSTILE.values(), ids=HOSTILE)
def test_hostile_forms_are_refused_in_few_words(trial, form):
    assert len(refusal(trial, form)) < MAX_SHOWN + 100
    assert trial.grammar_text(FINE)


def test_a_form_that_takes_for_ever_ends_its_process_and_others_do_not_wait(trial):
    trial.grammar_text(FINE)
    first = pid_of(trial)
    asking = threading.Thread(target=refusal, args=(trial, ENDLESS))
    asking.start()
    while not trial._lock.locked():
        assert asking.is_alive()
    assert trial.grammar_text(FINE)
    assert trial._lock.locked()
    asking.join(60)
    assert trial._process is None
    assert not is_left(first)
    assert trial.grammar_text(Form(regex="c+"))
    assert pid_of(trial) != first


def test_a_form_that_takes_for_ever_is_told_the_limits(trial, monkeypatch):
    monkeypatch.setattr("fastgen_jax.server.trial.MAX_SECONDS", 0.2)
    assert "more than 2 s or 1024 MiB" in refusal(trial, ENDLESS)


def test_a_process_that_was_killed_refuses_once_and_is_followed_by_another(trial):
    trial.grammar_text(Form(regex="d"))
    os.kill(pid_of(trial), signal.SIGKILL)
    refusal(trial, Form(regex="e"))
    assert trial.grammar_text(Form(regex="e"))


def test_nothing_is_left_of_a_closed_trial_and_it_tries_no_more(tokenizer):
    trial = make(tokenizer)
    trial.grammar_text(FINE)
    pid = pid_of(trial)
    trial.close()
    assert not is_left(pid)
    assert "the server ends" in refusal(trial, Form(regex="f"))
    assert trial._process is None


def test_closing_ends_what_is_on_trial(tokenizer):
    trial = make(tokenizer)
    trial.grammar_text(FINE)
    pid = pid_of(trial)
    asking = threading.Thread(target=refusal, args=(trial, ENDLESS))
    asking.start()
    while not trial._lock.locked():
        assert asking.is_alive()
    trial.close()
    asking.join(20)
    assert not asking.is_alive()
    assert not is_left(pid)


def test_a_trial_that_was_asked_nothing_has_no_process(tokenizer):
    trial = make(tokenizer)
    trial.close()
    assert trial._process is None
