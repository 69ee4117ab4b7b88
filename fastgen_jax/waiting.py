"""The two ways to wait for a Generation: in a thread (`finish`) and on an event loop (`stream`).

Whoever stops waiting, by Ctrl-C, an exception or a cancelled task, has cancelled its requests, and
nobody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from fastgen_jax.engine.types import Request
from fastgen_jax.generation import Ended, Event, Generation, Job
from fastgen_jax.results import CompletionOutput, RequestOutput
from fastgen_jax.sampling_params import RequestOutputKind
from fastgen_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastgen_jax.driver import Driver

REFRESH_SECONDS = 0.1  # of the progress bar

OnToken = Callable[[int, CompletionOutput], object]


def finish(
    driver: Driver,
    tokenizer: Tokenizer | None,
    requests: list[Request],
    *,
    use_tqdm: bool | Callable[..., Any] = False,
    on_token: OnToken | None = None,
) -> list[Job]:
    """Runs requests to their ends. After an interrupt it raises once all is cancelled; a second one
    does not wait for that.

    Args:
        use_tqdm: whether to show a bar, or what makes it.
        on_token: called in this thread with each token, as LLM.generate says.
    """
    from tqdm import tqdm

    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    generation = Generation(tokenizer, requests, events.put, tells_tokens=on_token is not None)
    make_bar = use_tqdm if callable(use_tqdm) else tqdm
    bar = make_bar(total=len(requests), unit="prompt", miniters=0, disable=not use_tqdm)
    with bar:
        try:
            driver.start(generation)
            ended = _follow(generation, events, bar, on_token)
        except BaseException:
            if driver.cancel(generation):
                while not isinstance(events.get(), Ended):
                    pass
            raise
    if ended.thread is not None:
        ended.thread.join()  # it holds the engine, which may be dropped next
    if ended.error is not None:
        raise ended.error
    return generation.jobs


def _follow(
    generation: Generation,
    events: queue.SimpleQueue[Event],
    bar: Any,
    on_token: OnToken | None,
) -> Ended:
    """Shows and calls back what happens, until the end."""
    start, n_shown = time.monotonic(), 0
    while True:
        event: Event = []
        with contextlib.suppress(queue.Empty):
            event = events.get(timeout=REFRESH_SECONDS)
        speed = generation.n_tokens / (time.monotonic() - start)
        if speed:
            bar.set_postfix_str(f"{speed:.1f} tokens/s", refresh=False)
        n_finished = max(generation.n_finished, n_shown)  # read while it changes, it may lag
        bar.update(n_finished - n_shown)
        n_shown = n_finished
        if isinstance(event, Ended):
            return event
        for token in event:
            assert on_token is not None
            on_token(*token)


async def stream(
    driver: Driver, tokenizer: Tokenizer | None, request: Request, prompt: str | None
) -> AsyncGenerator[RequestOutput, None]:
    """What there is of a request's samples, whenever there is more, as its output_kind says.

    prompt: its text, if it came as one.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Event] = asyncio.Queue()

    def tell(event: Event) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:  # the loop is closed
            driver.cancel(generation)

    generation = Generation(tokenizer, [request], tell, tells_tokens=True)
    [job] = generation.jobs
    kind, n_open = request.params.output_kind, request.params.n
    samples: dict[int, CompletionOutput] = {}
    driver.start(generation)
    try:
        while n_open:
            for new in await _news(events):
                samples[new.index] = joined(samples.get(new.index), new)
                n_open -= new.finish_reason is not None
            if not n_open or kind is not RequestOutputKind.FINAL_ONLY:
                outputs = [samples[index] for index in sorted(samples)]
                yield dataclasses.replace(job.result(prompt, outputs), finished=not n_open)
            if kind is RequestOutputKind.DELTA:
                samples = {}
    finally:
        driver.cancel(generation)


async def _news(events: asyncio.Queue[Event]) -> list[CompletionOutput]:
    """All that has come of one prompt, at least something. Raises what ended the generation."""
    event, news = await events.get(), []
    while not isinstance(event, Ended):
        news += [new for _, new in event]
        if events.empty():
            return news
        event = events.get_nowait()
    if event.error is not None:
        raise event.error
    return news


def joined(old: CompletionOutput | None, new: CompletionOutput) -> CompletionOutput:
    """A sample, and what is new of it."""
    if old is None:
        return new
    logprobs = None
    if old.logprobs is not None and new.logprobs is not None:
        logprobs = old.logprobs + new.logprobs
    return dataclasses.replace(
        new,
        text=old.text + new.text,
        token_ids=old.token_ids + new.token_ids,
        logprobs=logprobs,
    )
