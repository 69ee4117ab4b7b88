"""hf_overrides: other values in config.json, for all that reads it."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.__main__ import main as convert
from fastgen_jax import serve
from fastgen_jax.checkpoints.directory import read_config, read_generation_config
from fastgen_jax.checkpoints.overrides import overridden
from fastgen_jax.checkpoints.tensor_files import read_json
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.errors import CheckpointError, ConfigError
from tests.tiny import make_engine, one_program, write_config

GOLDEN = Path(__file__).parents[1] / "golden"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
BASE = {"rope_theta": 500.0, "partial_rotary_factor": 0.5}
NEW_FORM = {"rope_parameters": {"rope_type": "linear", "factor": 2.0} | BASE}
OLD_FORM = {"rope_scaling": {"type": "linear", "factor": 2.0}} | BASE
FULL, LOCAL = "full_attention", "sliding_attention"


def test_a_config_within_is_changed_key_by_key_and_other_values_are_replaced():
    text = {"vocab_size": 9, "rope_scaling": {"type": "linear", "factor": 2.0, "low": 1}}
    hf = {"text_config": text, "quantization_config": {"quant_method": "awq", "bits": 4}, "n": [1]}
    changes = {"text_config": {"rope_scaling": YARN}, "n": None}
    changes |= {"quantization_config": {"quant_method": "fp8"}}
    assert overridden(hf, changes) == changes | {
        "text_config": {"vocab_size": 9, "rope_scaling": YARN}
    }


@pytest.mark.parametrize("form", [NEW_FORM, OLD_FORM], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_rope_is_changed_in_either_form_whichever_the_file_has(tmp_path, form, name):
    write_config(tmp_path, **form)
    rope = read_config(tmp_path, {name: YARN}).rope
    assert rope is not None
    assert (rope.kind, rope.factor, rope.original_max_position) == ("yarn", 4.0, 256)
    assert (rope.theta, rope.size) == (500.0, 4)
    for nothing in (None, {}):
        rope = read_config(tmp_path, {name: nothing}).rope
        assert rope is not None
        assert (rope.kind, rope.theta, rope.size) == ("default", 500.0, 4)


@pytest.mark.parametrize("form", [NEW_FORM, OLD_FORM], ids=["rope_parameters", "rope_scaling"])
def test_base_and_share_of_rotation_are_changed_alone(tmp_path, form):
    write_config(tmp_path, **form)
    rope = read_config(tmp_path, {"rope_theta": 7.0, "partial_rotary_factor": 1.0}).rope
    assert rope is not None
    assert (rope.kind, rope.factor, rope.theta, rope.size) == ("linear", 2.0, 7.0, None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": YARN}, {FULL: YARN | {"rope_theta": 1000.0}}),
        ({"rope_parameters": YARN}, {FULL: YARN | {"rope_theta": 1000.0}}),
        ({"rope_parameters": {FULL: YARN}}, {FULL: YARN | {"rope_theta": 1000.0}}),
        ({"rope_local_base_freq": 9.0}, {LOCAL: {"rope_theta": 9.0, "rope_type": "default"}}),
    ],
)
def test_rope_by_type_of_layer_is_scaled_where_all_is_seen(changes, expected):
    hf = read_json(GOLDEN / "gemma3_text" / "config.json")
    rope = overridden(hf, changes)["rope_parameters"]
    assert rope == hf["rope_parameters"] | expected


def test_the_text_of_a_model_that_also_sees_is_stretched_and_ends_elsewhere():
    golden, changes = GOLDEN / "qwen2_5_vl", {"text_config": {"rope_scaling": YARN}}
    config = read_config(golden, changes | {"eos_token_id": 9})
    assert config.rope is not None
    assert (config.rope.kind, config.rope.factor, config.eos_token_ids) == ("yarn", 4.0, (9,))


@pytest.mark.parametrize(
    ("hf", "changes", "message"),
    [
        ({}, {"text_config": {"vocab_size": 9}}, "config.json has no text_config; leave it out"),
        ({"a": 0, "text_config": {"a": 1}}, {"a": 2}, "a belongs into the text_config of this"),
        ({"text_config": {}}, {"rope_scaling": YARN}, 'write {"text_config": {"rope_scaling": ...'),
        ({}, {"rope_scaling": "yarn"}, "rope_scaling must be a JSON object or null, got 'yarn'"),
        ({}, {"rope_scaling": YARN, "rope_parameters": YARN}, "give one of them"),
    ],
)
def test_a_change_that_nothing_would_read_is_refused(hf, changes, message):
    with pytest.raises(ConfigError) as raised:
        overridden(hf, changes)
    assert message in str(raised.value)


@pytest.mark.parametrize("value", [[], "{}", 5, {1: 2}, lambda config: config])
def test_what_is_no_json_object_is_refused(value):
    with pytest.raises(ConfigError, match="hf_overrides must be a JSON object, got "):
        EngineConfig(hf_overrides=value)


def test_configs_with_overrides_can_still_be_keys():
    assert len({EngineConfig(hf_overrides={"a": 1}), EngineConfig(hf_overrides={"a": 2})}) == 2


@pytest.mark.parametrize("text", ["[1]", "{", "yarn", '{"a": ' * 100_000])
def test_a_flag_that_is_no_json_object_is_refused(text):
    with pytest.raises(ConfigError, match="argument --hf-overrides: expected a JSON object such"):
        serve.parse(["--hf-overrides", text])
    given, *_ = serve.parse(["--hf-overrides", '{"rope_scaling": {"factor": 4}}'])
    assert given.hf_overrides == {"rope_scaling": {"factor": 4}}


def test_a_stretched_context_and_another_end_of_sequence_reach_the_engine(tmp_path):
    """As Qwen's cards have users stretch it, but smaller."""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    overrides = {"rope_scaling": YARN, "eos_token_id": [5, 6]}
    engine = make_engine(tmp_path, one_program, max_model_len=1024, hf_overrides=overrides)
    assert engine.config.max_model_len == 1024
    assert engine.model_config.eos_token_ids == (5, 6)
    assert "eos_token_id" not in read_generation_config(tmp_path, overrides)
    assert read_generation_config(tmp_path, {"rope_scaling": YARN}) == {"eos_token_id": 7}


def test_the_loader_sees_another_quantisation(tmp_path):
    write_config(tmp_path, quantization_config={"quant_method": "awq"})
    save_file({"t": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="quantised with awq"):
        Engine(EngineConfig(model=str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"unused: t in model\.safetensors"):
        Engine(EngineConfig(model=str(tmp_path), hf_overrides={"quantization_config": None}))


def test_a_converted_model_keeps_what_was_changed(tmp_path):
    arguments = [GOLDEN / "gqa", tmp_path / "orbax", "--hf-overrides", '{"eos_token_id": 5}']
    assert convert([str(argument) for argument in arguments]) == 0
    assert json.loads((tmp_path / "orbax" / "config.json").read_text())["eos_token_id"] == 5
    assert read_config(tmp_path / "orbax").eos_token_ids == (5,)
