"""What callers ask of a server under test: every kind of request, drawn from a seed."""

import json
import random
from collections.abc import Iterator
from typing import Any

from benchmarks.server.client import Call

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# A small pool, so that preemptions happen: 640 tokens for ten sequences of up to 512.
FLAGS = (
    *("--dtype", "float32", "--max-model-len", "512", "--block-size", "16"),
    *("--num-kv-blocks", "41", "--max-num-seqs", "10", "--max-num-batched-tokens", "128"),
    *("--max-queued-requests", "24", "--max-body-bytes", "60000"),
    *("--stream-timeout", "3", "--queue-timeout", "120", "--log-level", "warning"),
)
ANSWERED = frozenset({200, 429})
MAY_FAIL = ANSWERED | {500}
SENTENCES = (
    "Once upon a time there was a little dog. ", "Tom has a red ball. ", "Anna went to the park. ",
    "The code of Anna is 7312. ", "The sun was warm and the sky was blue. ", "A bird sang. ",
    "Lily and Ben wanted to play in the garden. ", "It began to rain. ",
)  # fmt: skip
# Prompts whose greedy answers are known from the idle server.
KNOWN = {
    "short": "Once upon a time",
    "name": "Tom and his dog went to the",
    "code": "The code of Anna is 7312. What is the code of Anna?",
    "shared 1": "".join(SENTENCES) * 2 + "Then Lily said",
    "shared 2": "".join(SENTENCES) * 2 + "Then the bird",
    "long": "".join(SENTENCES) * 5 + "At the end",
}
KNOWN_LENGTH = 40  # tokens
BAD_BODIES = (
    (b'{"prompt": "Once', 400), (b"\xff\xfe", 400), (b"[" * 5000, 400), (b'{"prompt": 5}', 400),
    (b'{"prompt": "a", "max_tokens": -1}', 400), (b'{"prompt": "a", "n": 1000000000}', 400),
    (b'{"prompt": "a", "temperature": NaN}', 400), (b'{"prompt": [999999]}', 400),
    (b'{"prompt": "a", "model": "other"}', 404),
    (json.dumps({"prompt": "a dog " * 2000}).encode(), 400),
    (json.dumps({"prompt": "a dog " * 20000}).encode(), 413),
)  # fmt: skip


def encode(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def known_call(name: str, *, is_chat: bool, is_stream: bool, n: int = 1) -> Call:
    """A greedy request whose answer does not depend on how it is asked for."""
    body: dict[str, Any] = {"max_tokens": KNOWN_LENGTH, "temperature": 0, "n": n}
    if is_chat:
        body["messages"] = [{"role": "user", "content": KNOWN[name]}]
    else:
        body["prompt"] = KNOWN[name]
    if is_stream:
        body["stream"] = True
    key = f"{name}, {'chat' if is_chat else 'text'}, {n}"
    return Call(CHAT if is_chat else COMPLETIONS, encode(body), MAY_FAIL, is_stream, known=key)


def references() -> Iterator[Call]:
    """Every known request once, as it is asked for in the simplest way."""
    for name in KNOWN:
        for is_chat in (False, True):
            for n in (1, 2):
                yield known_call(name, is_chat=is_chat, is_stream=False, n=n)


class Mix:
    """An endless mixed load, the same for the same seed."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def call(self) -> Call:
        draw = self._random
        kinds = (self._known, self._sampled, self._leaver, self._reader, self._refused)
        return draw.choices(kinds, (40, 25, 15, 4, 10))[0]()

    def _known(self) -> Call:
        draw = self._random
        is_chat, is_stream = draw.random() < 0.5, draw.random() < 0.5
        name = draw.choice(list(KNOWN))
        return known_call(name, is_chat=is_chat, is_stream=is_stream, n=draw.choice((1, 1, 2)))

    def _sampled(self) -> Call:
        draw = self._random
        body = {
            "prompt": self._story(draw.choice((1, 3, 10, 20))),
            "max_tokens": draw.choice((1, 16, 60, 120)),
            "temperature": draw.choice((0.5, 1.0, 1.5)),
            "n": draw.choice((1, 1, 2, 3)),
            "stream": draw.random() < 0.6,
            "seed": draw.randrange(1000),
        }
        if draw.random() < 0.5:
            body["stop"] = [" the", "dog", "."][: draw.randint(1, 3)]
        if draw.random() < 0.2:
            body |= {"logprobs": 3, "presence_penalty": 0.5, "top_p": 0.9, "top_k": 40}
        return Call(COMPLETIONS, encode(body), MAY_FAIL, body["stream"])

    def _leaver(self) -> Call:
        draw = self._random
        is_stream = draw.random() < 0.7
        behaviour = draw.choice(("closes", "resets"))
        return self._endless(is_stream)._replace(
            behaviour=behaviour, patience=draw.choice((0.0, 0.05, 0.2, 0.6))
        )

    def _reader(self) -> Call:
        """Much text, for one who takes it slowly or not at all."""
        call = self._endless(is_stream=True, logprobs=20)
        return call._replace(behaviour=self._random.choice(("slow", "stalls")))

    def _endless(self, is_stream: bool, **options: Any) -> Call:
        body = {"prompt": self._story(2), "max_tokens": 150, "ignore_eos": True} | options
        return Call(COMPLETIONS, encode(body | {"stream": is_stream}), MAY_FAIL, is_stream)

    def _refused(self) -> Call:
        body, status = self._random.choice(BAD_BODIES)
        if self._random.random() < 0.1:
            return Call(COMPLETIONS, body, frozenset({415, 413, 429}), header="text/plain")
        return Call(COMPLETIONS, body, frozenset({status, 429}))

    def _story(self, n_sentences: int) -> str:
        return "".join(self._random.choices(SENTENCES, k=n_sentences))


def small() -> Call:
    """One of many at once."""
    body = {"prompt": "Once upon a time", "max_tokens": 4, "ignore_eos": True}
    return Call(COMPLETIONS, encode(body), MAY_FAIL)


def victim() -> Call:
    """A stream long enough to be killed in the middle."""
    body = {"prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True, "stream": True}
    return Call(COMPLETIONS, encode(body), MAY_FAIL, is_stream=True)
