"""Weights that are replaced while an engine runs, against fresh engines and naive loops."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import fastgen_jax.models.families as families
from fastgen_jax import models
from fastgen_jax.checkpoints import weights
from fastgen_jax.checkpoints.loading import flat_params
from fastgen_jax.engine.types import Request
from fastgen_jax.errors import CheckpointError, ConfigError, EngineStopped, WeightsError
from fastgen_jax.sampling_params import SamplingParams
from tests import tiny
from tests.engine.test_source import UNEVEN, buffers, engine_on, live_bytes, module

GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def modules():
    """Two models of one shape."""
    return module(0), module(1)


@pytest.fixture(scope="module")
def running(modules):
    with engine_on(modules[0]) as engine:
        yield engine


@pytest.fixture
def engine(running, modules):
    running.update_weights(modules[0])
    yield running
    tiny.assert_idle(running)


def naive(module):
    return tiny.Naive.of_model(module, module.config.n_layers, 96)


def arrays_of(module):
    return {path: param.get_raw_value() for path, param in flat_params(module).items()}


def named_by_hugging_face(module):
    """What a checkpoint of it would hold."""
    params, config = arrays_of(module), module.config
    family = families.family(config.family)
    return {
        source.name: np.array(weights.extract(source, np.asarray(params[source.path]), config))
        for source in weights.expand(family.WEIGHTS, config)
        if source.path in params
    }


def nested(module):
    tree = {}
    for path, array in arrays_of(module).items():
        *folders, name = path.split(".")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = array
    return tree


SOURCES = {
    "module": lambda m: m,
    "state": lambda m: nnx.state(m, nnx.Param),
    "pure state": lambda m: nnx.to_pure_dict(nnx.state(m)),
    "flat": arrays_of,
    "nested": nested,
    "numpy": lambda m: {path: np.array(array) for path, array in arrays_of(m).items()},
    "hugging face": named_by_hugging_face,
    "hugging face on the device": lambda m: {
        name: jnp.asarray(array) for name, array in named_by_hugging_face(m).items()
    },
}


@pytest.mark.parametrize("kind", SOURCES)
def test_engine_has_the_tokens_and_logprobs_of_its_new_weights(
    kind, engine, modules, forbid_compile
):
    requests = tiny.random_requests(1, 3, max_tokens=8, logprobs=2)
    with engine_on(modules[1]) as fresh:
        expected = tiny.run(fresh, requests)
    tiny.run(engine, requests)  # and what that leaves in the prefix cache
    source = SOURCES[kind](modules[1])
    with forbid_compile():
        engine.update_weights(source)
        found = tiny.run(engine, requests)
    for one, other in zip(found, expected, strict=True):
        assert [(o.token_id, o.logprobs) for o in one] == [(o.token_id, o.logprobs) for o in other]


def test_arrays_that_need_nothing_are_shared(engine, modules):
    engine.update_weights(modules[1])
    given = jax.tree.leaves(modules[1])
    assert list(map(buffers, engine._runner.leaves)) == list(map(buffers, given))


def test_numpy_arrays_stay_the_callers(engine, modules):
    own = {path: np.array(array) for path, array in arrays_of(modules[1]).items()}
    engine.update_weights(own)
    expected = naive(modules[1]).greedy([1, 2, 3], 6)
    for array in own.values():
        array[...] = 0
    (outputs,) = tiny.run(engine, [Request([1, 2, 3], SamplingParams(max_tokens=6, **GREEDY))])
    assert tiny.tokens(outputs) == expected


def test_checkpoint_is_read_in_place(engine, modules, tmp_path, forbid_compile):
    from safetensors.numpy import save_file

    path = tiny.write_config(tmp_path)
    save_file(named_by_hugging_face(modules[1]), tmp_path / "model.safetensors")
    with forbid_compile():
        engine.update_weights(path)
    for found, expected in zip(engine._runner.leaves, jax.tree.leaves(modules[1]), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert arrays_of(models.load(tmp_path)).keys() == arrays_of(modules[1]).keys()


@pytest.mark.parametrize("name", ["norm.weight", "model.norm.weight"])
def test_some_weights_may_be_named(name, engine, modules):
    engine.update_weights({name: np.full(32, 2.0, np.float32)})
    found = dict(zip(arrays_of(modules[0]), engine._runner.leaves, strict=True))
    expected = arrays_of(modules[0]) | {"norm.weight": np.full(32, 2.0)}
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array)


def test_part_of_a_fused_product_may_be_named(engine, modules):
    name = "model.layers.1.self_attn.k_proj.weight"
    mixed = named_by_hugging_face(modules[0]) | {name: named_by_hugging_face(modules[1])[name]}
    engine.update_weights({name: mixed[name]})
    found = [np.array(leaf) for leaf in engine._runner.leaves]
    engine.update_weights(mixed)
    for one, other in zip(found, engine._runner.leaves, strict=True):
        np.testing.assert_array_equal(one, other)


class TestInFlight:
    """Requests that run when the weights change."""

    prompts = ([1, 2, 3, 4, 5, 6, 7, 8, 9], [11, 12, 13])

    def begin(self, engine, n_steps=5):
        params = SamplingParams(max_tokens=12, **GREEDY)
        ids = [engine.submit(Request(prompt, params)) for prompt in self.prompts]
        found = {id: [] for id in ids}
        for _ in range(n_steps):
            self.step(engine, found)
        assert all(0 < len(tokens) < 12 for tokens in found.values())
        return found

    def step(self, engine, found):
        for output in engine.step():
            if output.token_id is not None:
                found.setdefault(output.request_id, []).append(output.token_id)

    def finish(self, engine, found):
        while engine.has_work:
            self.step(engine, found)
        return list(found.values())

    def test_they_go_on_with_the_new_weights_as_if_these_had_made_all(self, engine, modules):
        found = self.begin(engine)
        n_preemptions = engine.stats().n_preemptions
        engine.update_weights(modules[1])
        assert engine.stats().n_preemptions - n_preemptions == 2
        n_old = [len(tokens) for tokens in found.values()]
        outputs = engine._undelivered  # of the step that was on its way
        n_old = [
            n + sum(o.request_id == id for o in outputs) for id, n in zip(found, n_old, strict=True)
        ]
        tokens = self.finish(engine, found)
        for prompt, known, n in zip(self.prompts, tokens, n_old, strict=True):
            assert known[:n] == naive(modules[0]).greedy([*prompt], n)
            assert known[n:] == naive(modules[1]).greedy([*prompt, *known[:n]], 12 - n)

    def test_they_end_with_the_old_weights_and_those_that_wait_get_the_new(self, engine, modules):
        found = self.begin(engine)
        late = engine.submit(Request([*self.prompts[0]], SamplingParams(max_tokens=12, **GREEDY)))
        engine.update_weights(modules[1], in_flight="drain")
        assert engine.has_work
        *early, last = self.finish(engine, found)
        assert list(found)[-1] == late
        assert early == [naive(modules[0]).greedy([*prompt], 12) for prompt in self.prompts]
        assert last == naive(modules[1]).greedy([*self.prompts[0]], 12)

    def test_what_they_have_cached_may_stay(self, engine, modules):
        scaled = {"norm.weight": 3 * arrays_of(modules[0])["norm.weight"]}  # which no cell sees
        scaled |= {"embed.weight": -np.asarray(arrays_of(modules[0])["embed.weight"])}
        found = self.begin(engine)
        n_step_tokens = engine.stats().n_step_tokens
        engine.update_weights(scaled, in_flight="keep")
        self.finish(engine, found)
        n_left = 24 - sum(len(tokens) for tokens in found.values())
        assert n_left == 0
        assert engine.stats().n_step_tokens - n_step_tokens < 24  # no prompt again
        assert self.tokens_of_next(engine, self.prompts[0]) == self.tokens_of_next(
            engine_on(modules[0]), self.prompts[0], scaled
        )

    def tokens_of_next(self, engine, prompt, update=None):
        """Of a prompt that would find cells of old weights, if any were left."""
        if update:
            engine.update_weights(update)
        params = SamplingParams(max_tokens=6, **GREEDY)
        (outputs,) = tiny.run(engine, [Request([*prompt, 1], params)])
        return tiny.tokens(outputs)

    def test_thread_that_runs_the_engine_makes_the_change(self, engine, modules):
        outputs, has_begun, is_over = [], threading.Event(), threading.Event()

        def deliver(new):
            outputs.extend(new)
            has_begun.set()
            if any(o.finish_reason for o in outputs):
                is_over.set()

        late = engine_on(modules[0])
        thread = threading.Thread(target=late.run, args=(deliver,))
        thread.start()
        late.submit(Request([1, 2, 3], SamplingParams(max_tokens=80, **GREEDY)))
        assert has_begun.wait(60)
        late.update_weights(modules[1], in_flight="drain")
        assert is_over.is_set()
        assert tiny.tokens(outputs) == naive(modules[0]).greedy([1, 2, 3], 80)
        late.close()
        thread.join(60)

    def test_who_waits_for_a_drain_is_told_that_the_engine_is_closed(self, modules):
        late = engine_on(modules[0])
        late.submit(Request([1, 2, 3], SamplingParams(max_tokens=80, **GREEDY)))
        late.step()
        late._stepping.acquire()  # somebody steps, slowly
        errors = []

        def update():
            try:
                late.update_weights(modules[1], in_flight="drain")
            except EngineStopped as error:
                errors.append(error)

        thread = threading.Thread(target=update)
        thread.start()
        while not late._changes:
            pass
        late.close()
        late._stepping.release()
        thread.join(60)
        assert len(errors) == 1


class TestRefusals:
    """Everything that is wrong is told at once, and nothing is changed."""

    @pytest.fixture(autouse=True)
    def unchanged(self, engine):
        before = engine._runner.leaves
        yield
        assert all(a is b for a, b in zip(before, engine._runner.leaves, strict=True))

    def test_every_problem_of_our_paths_is_listed_with_the_nearest_name(self, engine, modules):
        given = arrays_of(modules[1])
        given["norm.wieght"] = given.pop("norm.weight")
        given["embed.weight"] = given["embed.weight"][:5]
        given["layers.0.mlp.down.weight"] = given["layers.0.mlp.down.weight"].astype(jnp.int32)
        given["layers.1.mlp.down.weight"] = 3
        with pytest.raises(WeightsError) as caught:
            engine.update_weights(given)
        text = str(caught.value)
        assert "unused: norm.wieght; did you mean norm.weight?" in text
        assert "shape: embed.weight is (5, 32), the model wants (62, 32)" in text
        assert "dtype: layers.0.mlp.down.weight is int32" in text
        assert "no array: layers.1.mlp.down.weight is of the type int" in text
        assert "4 problems" in text

    def test_every_problem_of_hugging_faces_names_is_listed(self, engine, modules):
        given = named_by_hugging_face(modules[1])
        given["model.layers.0.self_attn.o_prj.weight"] = given["model.norm.weight"]
        given["model.norm.weight"] = np.zeros(3, np.float32)
        given["lm_head.weight"] = given["model.embed_tokens.weight"] + 1
        with pytest.raises(WeightsError) as caught:
            engine.update_weights(given)
        text = str(caught.value)
        assert "did you mean model.layers.0.self_attn.o_proj.weight?" in text
        assert (
            "shape: model.norm.weight in the given arrays is (3,), the config wants (32,)" in text
        )

    def test_head_that_the_model_does_not_have_is_refused(self, engine):
        with pytest.raises(WeightsError, match="the model's head is its embedding"):
            engine.update_weights({"lm_head.weight": np.zeros((62, 32), np.float32)})

    def test_module_must_be_whole_and_of_the_same_config(self, engine):
        with pytest.raises(WeightsError, match=r"config: n_layers is 1, .*'s is 2"):
            engine.update_weights(module(num_hidden_layers=1))

    def test_deleted_arrays_are_named(self, engine):
        given = module(1)
        given.norm.weight[...].delete()
        with pytest.raises(WeightsError, match=r"deleted: norm.weight was given away"):
            engine.update_weights(given)

    @pytest.mark.parametrize("source", [{}, 3, None, nnx.Linear])
    def test_what_holds_no_weights_is_refused(self, engine, source):
        with pytest.raises(WeightsError, match="no weights given"):
            engine.update_weights(source)

    def test_directories_that_do_not_fit_are_refused(self, engine, tmp_path):
        with pytest.raises(ConfigError, match="no directory"):
            engine.update_weights(tmp_path / "no" / "such")
        with pytest.raises(WeightsError, match="config: hidden_size is 16"):
            engine.update_weights(tiny.write_config(tmp_path / "small", hidden_size=16))
        with pytest.raises(CheckpointError, match=r"no .safetensors file"):
            engine.update_weights(tiny.write_config(tmp_path / "empty"))

    def test_what_shall_become_of_requests_must_be_known(self, engine, modules):
        with pytest.raises(ConfigError, match="in_flight must be one of recompute, drain, keep"):
            engine.update_weights(modules[1], in_flight="abort")


def test_weights_that_are_given_away_end_requests_with_the_reason_and_may_be_replaced(modules):
    shared = module(0)
    with engine_on(shared) as engine:
        for leaf in jax.tree.leaves(shared):
            leaf.delete()
        request = Request([1, 2, 3], SamplingParams(max_tokens=6, **GREEDY))
        (outputs,) = tiny.run(engine, [request])
        assert outputs[-1].finish_reason == "error"
        assert "given away (donated)" in outputs[-1].error
        with pytest.raises(WeightsError, match=r"missing: embed.weight \(the engine's was given"):
            engine.update_weights({"norm.weight": np.ones(32, np.float32)})
        engine.update_weights(modules[1])
        (outputs,) = tiny.run(engine, [request])
        assert tiny.tokens(outputs) == naive(modules[1]).greedy([1, 2, 3], 6)


def test_weight_that_cannot_be_made_leaves_an_engine_that_sleeps_without(modules, monkeypatch):
    with engine_on(module(0)) as engine:
        found = engine._exchange.read(modules[1])
        found["norm.weight"] = lambda old: 1 / 0
        monkeypatch.setattr(engine._exchange, "read", lambda source: found)
        with pytest.raises(WeightsError, match=r"could not be made .*ZeroDivisionError"):
            engine.update_weights(modules[1])
        assert engine.is_sleeping
        monkeypatch.undo()
        engine.update_weights(modules[1])
        engine.wake_up()
        (outputs,) = tiny.run(engine, [Request([1, 2], SamplingParams(max_tokens=4, **GREEDY))])
        assert tiny.tokens(outputs) == naive(modules[1]).greedy([1, 2], 4)


@pytest.mark.parametrize("changes", [{}, UNEVEN], ids=["even", "uneven"])
def test_weights_of_a_trainers_mesh_reach_an_engine_on_another(changes, forbid_compile):
    mesh = jax.make_mesh((2, 4), ("fsdp", "other"))
    expected, old = module(1, **changes), module(0, **changes)

    def over_all(array):  # as far as its axes divide
        names = [
            n if size % mesh.shape[n] == 0 else None
            for n, size in zip(mesh.axis_names, array.shape, strict=False)
        ]
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*names)))

    spread = {path: over_all(array) for path, array in arrays_of(expected).items()}
    request = Request([1, 2, 3], SamplingParams(max_tokens=6, **GREEDY))
    with engine_on(old, tensor_parallel_size=4) as engine, forbid_compile():
        engine.update_weights(spread)
        (outputs,) = tiny.run(engine, [request])
    assert tiny.tokens(outputs) == naive(expected).greedy([1, 2, 3], 6)


@pytest.mark.parametrize("n_devices", [1, 4])
def test_never_more_than_one_weight_beside_the_models(n_devices, monkeypatch, no_collection):
    old, new = module(0, n_devices), module(1, dtype="bfloat16")
    with engine_on(old, tensor_parallel_size=n_devices) as engine:
        del old
        before, peak = live_bytes(), 0
        device_put = jax.device_put

        def measured(*args, **options):
            nonlocal peak
            array = device_put(*args, **options)
            peak = max(peak, live_bytes() - before)
            return array

        monkeypatch.setattr(jax, "device_put", measured)
        engine.update_weights(new)
        largest = max(leaf.nbytes for leaf in engine._runner.leaves)
        assert 0 < peak <= 2 * largest  # on several devices, each one's part and all parts together
        assert live_bytes() <= before
