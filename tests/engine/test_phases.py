"""A profiler's trace of a run names what the host and the device did."""

import jax
import pytest
from jax.profiler import ProfileData

from fastgen_jax.engine.phases import PHASES
from fastgen_jax.llm import LLM
from fastgen_jax.sampling_params import SamplingParams
from tests import tiny


@pytest.fixture
def llm(tmp_path):
    return LLM.from_engine(tiny.make_engine(tmp_path / "model", tiny.one_program))


def host_events(directory):
    """Names of the host's events, by thread, and their statistics."""
    [path] = directory.rglob("*.xplane.pb")
    planes = ProfileData.from_file(str(path)).planes
    [host] = [plane for plane in planes if plane.name == "/host:CPU"]
    return [(event.name, dict(event.stats)) for line in host.lines for event in line.events]


def test_a_trace_of_a_run_has_its_steps_and_their_phases(llm, tmp_path):
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # no event for each call of Python
    with jax.profiler.trace(tmp_path / "trace", profiler_options=options):
        params = SamplingParams(max_tokens=4, ignore_eos=True, allowed_token_ids=[3, 4])
        llm.generate([1, 2, 3], params, use_tqdm=False)
    events = host_events(tmp_path / "trace")
    assert {name for name, _ in events} >= set(PHASES)
    steps = [int(stats["step_num"]) for name, stats in events if name == "step"]
    assert sorted(steps) == list(range(len(steps)))
    assert len(steps) >= 4


def test_phases_of_the_device_are_scopes_of_its_programs(llm):
    runner = llm.engine._runner
    text = runner.programs.made[runner.shapes[0]].as_text()
    for scope in ("token_ids", "attention", "pool", "score", "sample"):
        assert f"/{scope}/" in text, scope


def test_phases_take_the_time_that_the_host_spends(llm):
    llm.generate([1, 2, 3], SamplingParams(max_tokens=4), use_tqdm=False)
    spent = llm.engine.timings
    assert all(spent[phase] > 0 for phase in PHASES if phase != "mask")
    assert spent["mask"] == 0
