"""Client: MII's calls to a server of another process, answered as `pipeline` answers them.

Each call has connections and, if it blocks, an event loop of its own: a client may be shared by
threads, used in notebooks, and dropped without being closed. A call that is interrupted or
cancelled ends its connections, at which the server stops working on it.
"""

import asyncio
import dataclasses
import functools
import json
import queue
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import httpx2
from anyio.from_thread import start_blocking_portal

from fastgen_jax.errors import EngineStopped, FastGenError, InvalidRequest
from fastgen_jax.mii.deployments import SUFFIX, Deployment, Directory, last_lines
from fastgen_jax.mii.options import PipelineOptions, Response
from fastgen_jax.mii.wire import Wire
from fastgen_jax.prompts import Prompt, at_prompt, prompt_list, text_and_ids
from fastgen_jax.results import CompletionOutput
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.server.config import ServerConfig

COMPLETIONS = "/v1/completions"
# All that the server would else take from the model's generation_config.json, which MII ignores.
SENT = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "ignore_eos",
        "presence_penalty", "frequency_penalty", "repetition_penalty")  # fmt: skip

Result = TypeVar("Result")


class Asked(NamedTuple):
    """A prompt as text, as token ids, or both."""

    text: str | None
    ids: list[int] | None

    @property
    def body(self) -> str | list[int]:
        return (self.text or "") if self.ids is None else self.ids


class Client:
    """Speaks to one server. Its errors are those of the offline API, and FastGenError for a
    connection that is lost.

    What a response does not have is how many of its prompt's tokens were cached.

    Args:
        deployment: what `serve` has started; None: only the URL is known.
    """

    def __init__(self, wire: Wire, deployment: Deployment | None = None):
        self._wire = wire
        self._deployment = deployment
        self._limits = deployment or ServerConfig()

    @property
    def url(self) -> str:
        """Of the server; OpenAI's API is below it, at /v1."""
        return self._wire.url

    @property
    def api_key(self) -> str | None:
        """What other clients of the server must send."""
        return self._wire.api_key

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def __call__(self, prompts: Prompt | Iterable[Prompt], **options: Any) -> list[Response]:
        return self.generate(prompts, **options)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        streaming_fn: Callable[[list[Response]], object] | None = None,
        **options: Any,
    ) -> list[Response]:
        """Completes prompts; the responses are in their order.

        Args:
            prompts: as LLM.generate takes them.
            streaming_fn: called with each piece of the response, in a list; for one prompt only.
            options: PipelineOptions, the same for all prompts.

        Raises:
            InvalidRequest: a prompt or an option cannot be served; there are no responses then.
            QueueFull: the server has no room now.
            ConfigError: an unknown option.
        """
        if streaming_fn is None:
            with start_blocking_portal() as portal:
                return portal.call(functools.partial(self.generate_async, prompts, **options))
        asked = prompt_list(prompts)
        if len(asked) != 1:
            raise InvalidRequest(f"streaming_fn takes one prompt, not {len(asked)}")
        pieces = []
        for piece in self.stream(asked[0], **options):
            streaming_fn([piece])
            pieces.append(piece)
        return [_joined(pieces)]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Response]:
        """The pieces of a response as they come; each holds what is new. As `generate` else."""
        pieces: queue.SimpleQueue[Response | None] = queue.SimpleQueue()

        async def pump():
            try:
                async for piece in self.stream_async(prompt, **options):
                    pieces.put(piece)
            finally:
                pieces.put(None)

        with start_blocking_portal() as portal:
            pumping = portal.start_task_soon(pump)
            try:
                while (piece := pieces.get()) is not None:
                    yield piece
                pumping.result()
            finally:
                pumping.cancel()

    async def generate_async(
        self, prompts: Prompt | Iterable[Prompt], **options: Any
    ) -> list[Response]:
        """`generate`, awaited. If it is cancelled, the server stops working on it."""
        o = PipelineOptions.read(options)
        asked = [_asked(p, i) for i, p in enumerate(prompt_list(prompts))]
        self._check_running()
        responses = []
        async with self._wire.open() as http:
            params = await self._params(http, asked, o)
            n = self._limits.max_prompts  # more would find no room in the queue
            for at in range(0, len(asked), n):
                responses += await self._complete(http, asked[at : at + n], params[at : at + n])
        return [o.shown(response) for response in responses]

    async def stream_async(self, prompt: Prompt, **options: Any) -> AsyncIterator[Response]:
        """`stream`, for `async for`."""
        o = PipelineOptions.read(options)
        asked = _asked(prompt)
        self._check_running()
        async with self._wire.open() as http:
            ids = await self._ids(http, asked)
            asked, show = Asked(asked.text, ids), o.shown
            [params] = await self._params(http, [asked], o)
            body = _fields(params) | {"prompt": ids, "stream": True}
            async for event in self._wire.stream(http, COMPLETIONS, body):
                with self._wire.read():
                    piece = _response(event, event["choices"][0], asked.text, ids)
                yield show(piece)
                show = _as_it_is  # only the first piece begins with the prompt

    def status(self) -> dict[str, Any]:
        """What /health says, as {"phase": "ready", ...}; of a deployment that is gone, "ended".

        Raises:
            FastGenError: the server does not answer.
        """
        if self._deployment is not None and not self._deployment.process.is_running:
            return {"phase": "ended"}
        return self._wire.health()

    def terminate_server(self) -> None:
        """Ends the server, whoever of this user has started it: what runs may finish, for as long
        as the server's drain_timeout. Nothing happens if it has ended.

        Raises:
            FastGenError: the server is not one that `serve` started here.
        """
        if self._deployment is None:
            raise FastGenError(
                f"{self.url} cannot be ended by a client that knows its URL only: no request ends "
                "a server; use mii.client(deployment_name) where it runs, or send it SIGTERM"
            )
        terminate(self._deployment)

    def _check_running(self) -> None:
        """Keeps prompts and key from whoever may listen in the place of a server that has ended."""
        if self._deployment is not None and not self._deployment.process.is_running:
            log = Directory.of_user().log(self._deployment.name)
            raise EngineStopped(
                f"the server of {self._deployment.name!r} has ended; its last lines:\n"
                + last_lines(log)
            )

    async def _params(
        self, http: httpx2.AsyncClient, asked: list[Asked], o: PipelineOptions
    ) -> list[SamplingParams]:
        """What each prompt is completed with; where that depends on its length, the server tells
        that. Raises InvalidRequest.
        """
        if o.max_new_tokens is not None:
            return [o.sampling_params(0)] * len(asked)
        models = await self._wire.get(http, "/v1/models")
        with self._wire.read():
            longest = int(models["data"][0]["max_model_len"])
        lengths = [len(ids) for ids in await _all(self._ids(http, a) for a in asked)]
        params = [at_prompt(i, o.sampling_params, n) for i, n in enumerate(lengths)]
        return [
            dataclasses.replace(p, max_tokens=max(1, longest - n)) if p.max_tokens is None else p
            for p, n in zip(params, lengths, strict=True)
        ]

    async def _ids(self, http: httpx2.AsyncClient, asked: Asked) -> list[int]:
        if asked.ids is not None:
            return asked.ids
        answer = await self._wire.post(http, "/tokenize", {"prompt": asked.text})
        with self._wire.read():
            return answer["tokens"]

    async def _complete(
        self, http: httpx2.AsyncClient, asked: list[Asked], params: list[SamplingParams]
    ) -> list[Response]:
        """Completes prompts at once: in one request, all or none, unless they differ in params or
        are more text than one may have. If a request fails, the others are ended.
        """

        async def complete(batch: list[int]) -> list[Response]:
            own = [asked[i] for i in batch]
            body = _fields(params[batch[0]]) | {"prompt": [a.body for a in own]}
            answer = await self._wire.post(http, COMPLETIONS, body)
            with self._wire.read():
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                return [
                    _response(answer, choice, a.text, choice["prompt_token_ids"])
                    for a, choice in zip(own, choices, strict=True)
                ]

        batches = list(_batches(asked, params, self._limits.max_body_bytes))
        found: dict[int, Response] = {}
        for batch, responses in zip(batches, await _all(map(complete, batches)), strict=True):
            found |= zip(batch, responses, strict=True)
        return [found[i] for i in range(len(asked))]


def client(deployment_name_or_url: str, *, api_key: str | None = None) -> Client:
    """A client of a server that runs: one that `serve` has started on this machine, by its name or
    its model's, or any, by its URL.

    Args:
        api_key: for a URL; a deployment's is known.

    Raises:
        FastGenError: there is no such deployment.
    """
    name = deployment_name_or_url
    if "://" in name:
        return Client(Wire(name, api_key))
    directory = Directory.of_user()
    with directory.locked():
        found = directory.find(name) or directory.find(name + SUFFIX)
        known = directory.names()
    if found is None:
        raise FastGenError(
            f"no deployment {name!r} runs; "
            + (f"known: {', '.join(known)}" if known else "mii.serve starts one")
        )
    return Client(found.wire(), found)


def terminate(deployment: Deployment) -> None:
    """Ends a deployment's server and removes all that is kept of it."""
    deployment.stop()
    directory = Directory.of_user()
    with directory.locked():
        directory.remove(deployment)


def _asked(prompt: Prompt, index: int = 0) -> Asked:
    return Asked(*at_prompt(index, text_and_ids, prompt))


def _as_it_is(response: Response) -> Response:
    return response


def _fields(params: SamplingParams) -> dict[str, Any]:
    given = {name: getattr(params, name) for name in SENT}
    return {"return_token_ids": True, **given}


def _batches(
    asked: list[Asked], params: list[SamplingParams], max_bytes: int
) -> Iterator[list[int]]:
    """The indices of prompts that go in one request: of the same params, and of one body's size."""
    alike: dict[int | None, list[int]] = {}
    for i, p in enumerate(params):
        alike.setdefault(p.max_tokens, []).append(i)
    for indices in alike.values():
        room = max_bytes - len(json.dumps(_fields(params[indices[0]]))) - len('{"prompt": []}')
        batch, size = [], 0
        for i in indices:
            n = len(json.dumps(asked[i].body)) + len(", ")
            if batch and size + n > room:
                yield batch
                batch, size = [], 0
            batch.append(i)
            size += n
        yield batch


def _response(
    answer: dict[str, Any], choice: dict[str, Any], text: str | None, ids: list[int]
) -> Response:
    output = CompletionOutput(
        index=0,
        text=choice["text"],
        token_ids=choice["token_ids"],
        cumulative_logprob=None,
        logprobs=None,
        finish_reason=choice["finish_reason"],
        stop_reason=choice["stop_reason"],
    )
    is_finished = choice["finish_reason"] is not None
    request_id = f"{answer['id']}-{choice['index']}"
    return Response(request_id, text, ids, [output], finished=is_finished)


def _joined(pieces: list[Response]) -> Response:
    """The response that came in pieces, of which there is one at least."""
    outputs = [piece.outputs[0] for piece in pieces]
    output = dataclasses.replace(
        outputs[-1],
        text="".join(output.text for output in outputs),
        token_ids=[id for output in outputs for id in output.token_ids],
    )
    return dataclasses.replace(pieces[-1], outputs=[output])


async def _all(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """What they return; if one raises, the others are cancelled and it is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
