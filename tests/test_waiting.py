"""Many callers of one LLM: threads, event loops and callbacks share its engine's steps."""

import asyncio
import contextlib
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastgen_jax.errors import EngineStopped, InvalidRequest
from fastgen_jax.llm import LLM
from fastgen_jax.sampling_params import RequestOutputKind, SamplingParams
from fastgen_jax.tokenizer import Tokenizer
from tests import tiny_tokenizers
from tests.engine.simulation import fake_engine
from tests.server.running import wait_until
from tests.test_llm import FakeEngine, make_llm, token_ids

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
ANSWER = list(range(20, 28))
DELTAS = GREEDY.clone(output_kind=RequestOutputKind.DELTA)
ENDLESS = GREEDY.clone(max_tokens=1_000_000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer")))


@contextlib.contextmanager
def held_llm():
    """An LLM whose engine, asked for one prompt, stays in a step until the event is set."""
    go_on = threading.Event()
    llm = make_llm(on_step=lambda engine: go_on.wait(60))
    yield llm, go_on
    go_on.set()


def endless_llm():
    return make_llm(answer=range(2_000_000), max_total_tokens=2_000_000)


async def collected(outputs):
    return [output async for output in outputs]


def is_quiet(llm):
    """Whether nothing runs, waits or is held, and no thread is left."""
    return llm._driver._thread is None and not llm.engine.has_work


# --- threads


def test_callers_in_threads_share_steps():
    def generate(i):
        return llm.generate([i], GREEDY, use_tqdm=False)

    with ThreadPoolExecutor(3) as pool, held_llm() as (llm, go_on):
        calls = [pool.submit(generate, 1)]
        wait_until(lambda: llm._driver._owners)
        calls += [pool.submit(generate, i) for i in (2, 3)]
        wait_until(lambda: len(llm._driver._arrived) == 2)
        n_steps = []
        llm.engine.on_step = n_steps.append
        go_on.set()
        outs = [call.result(60)[0] for call in calls]
    assert [out.prompt_token_ids for out in outs] == [[1], [2], [3]]
    assert token_ids(outs) == [ANSWER] * 3
    assert len(n_steps) == 8, "they ran one after another"


def test_newcomers_run_beside_a_call_with_more_prompts_than_the_queue_holds():
    def generate(prompts):
        return llm.generate(prompts, GREEDY, use_tqdm=False)

    with ThreadPoolExecutor(2) as pool, held_llm() as (llm, go_on):
        calls = [pool.submit(generate, [[1]] * 5 * llm.engine.max_queued_requests)]
        wait_until(lambda: llm._driver._owners)
        calls.append(pool.submit(generate, [[2]]))
        wait_until(lambda: llm._driver._arrived)
        go_on.set()
        for call in calls:
            call.result(60)
    prompts = [request.prompt_token_ids for request in llm.engine.submitted]
    assert prompts.index([2]) < 2 * llm.engine.max_queued_requests


def test_steps_of_one_caller_are_the_same_in_every_run():
    params = SamplingParams(max_tokens=9, seed=1, ignore_eos=True)
    batches = []
    for _ in range(2):
        llm = LLM.from_engine(fake_engine())
        dispatch, sizes = llm.engine._runner.dispatch, []
        llm.engine._runner.dispatch = lambda batch, tables: (
            sizes.append(len(batch.sequences)) or dispatch(batch, tables)  # noqa: B023
        )
        llm.generate([[0, 1, i % 2] for i in range(30)], params, use_tqdm=False)
        batches.append(sizes)
    assert batches[0] == batches[1]
    assert len(batches[0]) > 20


def test_close_ends_calls_of_other_threads():
    llm = LLM.from_engine(fake_engine())
    engine, prompts, has_begun = llm.engine, [[0, 1]] * 900, threading.Event()

    def begin(i, new):
        has_begun.set()

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(llm.generate, prompts, GREEDY, use_tqdm=False, on_token=begin)
        assert has_begun.wait(60)
        llm.close()
        with pytest.raises(EngineStopped, match="closed"):
            call.result(60)
    assert engine._runner.is_closed
    wait_until(lambda: llm._driver._thread is None)


def test_llm_that_was_used_is_freed_with_its_last_reference():
    llm = LLM.from_engine(FakeEngine())
    gc.collect()
    gc.disable()
    try:
        llm.generate([[1], [2]], GREEDY, use_tqdm=False)
        engine = weakref.ref(llm.engine)
        del llm
        assert engine() is None
    finally:
        gc.enable()


def test_idle_llm_has_no_thread():
    llm = make_llm()
    llm.generate([1], GREEDY, use_tqdm=False)
    assert is_quiet(llm)
    assert "fastgen-llm" not in {thread.name for thread in threading.enumerate()}


def test_thread_whose_starter_was_interrupted_does_nothing():
    llm = make_llm()
    threading.Thread(target=llm._driver._run).start()  # and not noted as the one
    assert token_ids(llm.generate([1], GREEDY, use_tqdm=False)) == [ANSWER]
    assert is_quiet(llm)


# --- callbacks


def test_callback_sees_each_token_in_the_callers_thread(tokenizer):
    ids = tokenizer.encode("two balls", add_special_tokens=False)
    llm = LLM.from_engine(
        FakeEngine([*ids, tokenizer.eos_token_id], eos=tokenizer.eos_token_id), tokenizer
    )
    seen, threads = {}, set()

    def on_token(i, new):
        threads.add(threading.current_thread())
        seen.setdefault((i, new.index), []).append(new)

    params = SamplingParams(max_tokens=50, n=2, logprobs=1)
    outs = llm.generate(["a", "b"], params, use_tqdm=False, on_token=on_token)
    assert threads == {threading.current_thread()}
    for i, out in enumerate(outs):
        for sample in out.outputs:
            news = seen[i, sample.index]
            assert [new.token_ids for new in news] == [[id] for id in sample.token_ids]
            assert "".join(new.text for new in news) == sample.text == "two balls"
            assert [new.logprobs[0] for new in news] == sample.logprobs
            assert news[-1].cumulative_logprob == sample.cumulative_logprob
            assert [new.finish_reason for new in news if new.finish_reason] == ["stop"]


def test_error_in_a_callback_cancels_the_call_and_is_raised():
    llm = make_llm(answer=range(20, 2_000_000), max_total_tokens=2_000_000)

    def fail(i, new):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llm.generate([[1], [2], [3]], ENDLESS, use_tqdm=False, on_token=fail)
    assert ("cancel", 0) in llm.engine.calls
    assert is_quiet(llm)
    assert token_ids(llm.generate([1], GREEDY, use_tqdm=False)) == [ANSWER]


def test_callback_may_generate():
    llm, answers = make_llm(), []

    def ask(i, new):
        answers.extend(llm.generate([[5]], GREEDY, use_tqdm=False))

    llm.generate([1], GREEDY, use_tqdm=False, on_token=ask)
    assert token_ids(answers) == [ANSWER] * 8


# --- streams


def test_stream_yields_all_that_there_is_or_what_is_new_or_the_end(tokenizer):
    ids = tokenizer.encode("two balls", add_special_tokens=False)

    def streamed(kind):
        engine = FakeEngine([*ids, tokenizer.eos_token_id], eos=tokenizer.eos_token_id)
        llm = LLM.from_engine(engine, tokenizer)
        params = SamplingParams(max_tokens=50, output_kind=kind)
        return asyncio.run(collected(llm.stream("Anna has ", params)))

    whole = streamed(RequestOutputKind.CUMULATIVE)
    texts = [out.outputs[0].text for out in whole]
    assert texts == sorted(texts, key=len)
    assert texts[-1] == "two balls"
    assert [out.finished for out in whole] == [False] * (len(whole) - 1) + [True]
    news = streamed(RequestOutputKind.DELTA)
    assert "".join(out.outputs[0].text for out in news) == "two balls"
    assert [id for out in news for id in out.outputs[0].token_ids] == whole[-1].outputs[0].token_ids
    [last] = streamed(RequestOutputKind.FINAL_ONLY)
    assert last == whole[-1]
    assert (last.prompt, last.outputs[0].finish_reason) == ("Anna has ", "stop")


def test_streams_and_generate_share_an_event_loop():
    async def main(llm):
        streams = [asyncio.create_task(collected(llm.stream([i + 1], DELTAS))) for i in range(3)]
        await asyncio.sleep(0)
        generated = llm.generate([9], GREEDY, use_tqdm=False)  # which blocks this loop
        return generated, [await stream for stream in streams]

    llm = make_llm()
    generated, streamed = asyncio.run(main(llm))
    assert token_ids(generated) == [ANSWER]
    assert [[id for ids in token_ids(outs) for id in ids] for outs in streamed] == [ANSWER] * 3
    wait_until(lambda: is_quiet(llm))


def test_samples_of_a_stream_are_told_apart():
    outs = asyncio.run(collected(make_llm().stream([1], DELTAS.clone(n=3))))
    for index in range(3):
        news = [sample for out in outs for sample in out.outputs if sample.index == index]
        assert [id for sample in news for id in sample.token_ids] == ANSWER
    whole = asyncio.run(collected(make_llm().stream([1], GREEDY.clone(n=3))))
    assert token_ids(whole[-1:]) == [ANSWER] * 3


async def break_off(llm):
    async for _ in llm.stream([1], ENDLESS):
        break
    await asyncio.to_thread(wait_until, lambda: is_quiet(llm))


async def close_stream(llm):
    async with contextlib.aclosing(llm.stream([1], ENDLESS)) as outputs:
        await anext(outputs)


async def cancel_task(llm):
    has_begun = asyncio.Event()

    async def read():
        async for _ in llm.stream([1], ENDLESS):
            has_begun.set()

    task = asyncio.create_task(read())
    await has_begun.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("leave", [break_off, close_stream, cancel_task])
def test_stream_that_is_left_cancels_its_request(leave):
    llm = endless_llm()
    asyncio.run(leave(llm))
    wait_until(lambda: is_quiet(llm))
    assert set(llm.engine.calls) == {("cancel", 0)}


def test_stream_whose_loop_is_closed_cancels_its_request():
    llm, loop = endless_llm(), asyncio.new_event_loop()
    outputs = llm.stream([1], ENDLESS)
    loop.run_until_complete(anext(outputs))
    loop.close()
    wait_until(lambda: is_quiet(llm))
    assert set(llm.engine.calls) == {("cancel", 0)}
    with pytest.raises(StopIteration):  # it closes without its loop
        outputs.aclose().send(None)


def test_errors_arrive_in_the_loop_that_streams():
    def fail(engine):
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        asyncio.run(collected(make_llm(on_step=fail).stream([1], GREEDY)))
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        asyncio.run(collected(make_llm().stream([], GREEDY)))
    [out] = asyncio.run(collected(make_llm(poison=(0,)).stream([1], GREEDY)))
    assert out.outputs[0].error == "non-finite logits"


def test_close_ends_streams():
    llm = LLM.from_engine(fake_engine())

    async def main():
        await asyncio.gather(*(collected(llm.stream([0, 1], GREEDY)) for _ in range(900)), close())

    async def close():
        await asyncio.to_thread(wait_until, lambda: llm._driver._owners)
        llm.close()

    with pytest.raises(EngineStopped, match="closed"):
        asyncio.run(main())
