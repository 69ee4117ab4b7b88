"""Models that also see or hear, in the forms that the hub has: their text is found and served."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from fastgen_jax.checkpoints import loading
from fastgen_jax.checkpoints.directory import read_config
from fastgen_jax.errors import CheckpointError, ConfigError
from fastgen_jax.models.families import model_config
from fastgen_jax.models.families.wrappers import DEFAULTS, WRAPPERS, text_config
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.sharding import make_mesh
from tests.models.test_families import GOLDEN, assert_loads_as, golden_config


@pytest.mark.parametrize("inner", sorted(DEFAULTS))
def test_fields_that_a_text_config_leaves_out_are_those_of_transformers(inner):
    full = transformers.AutoConfig.for_model(inner).to_dict()
    bare = {name: value for name, value in full.items() if name not in DEFAULTS[inner]}
    outer = {"model_type": "llava"}
    assert model_config(outer | {"text_config": bare}) == model_config(
        outer | {"text_config": full}
    )


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_fields_of_the_text_at_the_top_read_alike(name):
    hf = golden_config(name)
    text = {key: value for key, value in hf["text_config"].items() if key != "rope_parameters"}
    rope = {"rope_theta": 100.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    flat = text | rope | tokens | {"model_type": name, "vision_config": {"depth": 1}}
    assert model_config(flat) == model_config(hf)


def test_stretched_contexts_of_mrope_read_as_without_sections():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    flat = golden_config("qwen2_vl")["text_config"] | {"model_type": "qwen2_vl"}
    flat["rope_parameters"] = None
    config = model_config(flat | {"rope_scaling": yarn | {"mrope_section": [2, 1, 1]}})
    assert config.rope is not None and config.rope.kind == "yarn"
    assert config == model_config(flat | {"rope_scaling": yarn})


@pytest.mark.parametrize(
    ("outer", "inner", "is_tied"),
    [
        (True, True, True),
        (None, True, True),
        (True, None, True),
        (False, True, False),
        (True, False, False),
        (None, None, False),
    ],
)
def test_head_is_tied_where_nobody_denies_it(outer, inner, is_tied):
    hf = {"model_type": "llava", "tie_word_embeddings": outer}
    hf["text_config"] = {"model_type": "llama", "tie_word_embeddings": inner}
    assert model_config(hf).tie_embeddings == is_tied


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"text_config": {"model_type": "xyz"}}, "model type 'xyz' is not supported; known"),
        ({"text_config": {}}, "model type 'llava_text' is not supported"),
        (
            {"text_config": {"model_type": "qwen3_next"}},
            "'qwen3_next' is not supported: its layers",
        ),
        ({"text_config": None}, "text_config in config.json must be an object, got None"),
        ({}, "config.json lacks 'text_config'"),
    ],
)
def test_texts_that_are_not_served_are_refused_by_their_own_name(tmp_path, hf, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"} | hf))
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_a_wrappers_golden_has_other_parts_and_only_the_named_ones(name):
    stored = load_file(GOLDEN / name / "model.safetensors")
    words = {first for key in stored for first in key.removeprefix("model.").split(".")[:1]}
    text = {"language_model", "text_model", "lm_head", "embed_tokens", "layers", "norm"}
    assert words - text == {*WRAPPERS[name]} - {"mtp"}  # which transformers neither has nor saves


def test_text_of_another_name_is_the_family_it_is():
    hf = golden_config("exaone4_5")
    named = hf | {"text_config": hf["text_config"] | {"model_type": "exaone4_5_text"}}
    assert model_config(named) == model_config(hf)


def test_part_that_no_wrapper_names_is_not_dropped(tmp_path):
    tensors = load_file(GOLDEN / "llava" / "model.safetensors")
    save_file(tensors | {"radar.weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(golden_config("llava")))
    with pytest.raises(CheckpointError, match=r"unused: radar\.weight in model\.safetensors"):
        loading.load_model(tmp_path, read_config(tmp_path), Policy(), make_mesh(1))


def test_text_alone_is_a_checkpoint_of_its_own(tmp_path):
    """As text models are cut out of those that see: no wrapper in names or config."""
    tensors = load_file(GOLDEN / "qwen3_vl" / "model.safetensors")
    text = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in tensors.items()
        if ".visual." not in name
    }
    save_file(text, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(text_config(golden_config("qwen3_vl"))))
    config = read_config(tmp_path)
    assert config == read_config(Path(GOLDEN / "qwen3_vl"))
    assert loading.load_model(tmp_path, config, Policy(), make_mesh(1))


def test_experts_in_one_tensor_load_in_either_order_of_axes(tmp_path):
    tensors = load_file(GOLDEN / "qwen3_vl_moe" / "model.safetensors")
    turned = {
        name: np.ascontiguousarray(tensor.swapaxes(1, 2)) if ".experts." in name else tensor
        for name, tensor in tensors.items()
    }
    assert_loads_as("qwen3_vl_moe", turned, tmp_path)
