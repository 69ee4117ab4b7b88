"""What a checkpoint is quantised with, from configs as the hub has them."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.__main__ import main as convert
from fastgen_jax.checkpoints import loading
from fastgen_jax.checkpoints.directory import read_config, read_hf
from fastgen_jax.checkpoints.quantisation import BESIDE, method_of, settings, without_settings
from fastgen_jax.checkpoints.tensor_files import read_headers, read_json, weight_files
from fastgen_jax.errors import CheckpointError
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.sharding import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden" / "gqa"
MODELOPT = {"producer": {"name": "modelopt", "version": "0.29.0"}}
FP8_ALGORITHM = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
BY_TENSOR = {"dynamic": False, "num_bits": 8, "type": "float"}
NEW_FORM = MODELOPT | {
    "config_groups": {"group_0": {"input_activations": BY_TENSOR, "weights": BY_TENSOR}},
    "ignore": ["lm_head"],
    "quant_algo": "FP8",
    "kv_cache_scheme": BY_TENSOR,
}
FP8_FORMS = {
    "with a method": {"quantization_config": NEW_FORM | {"quant_method": "modelopt"}},
    "without a method": {"quantization_config": NEW_FORM},
    "in its older form": {"quantization_config": MODELOPT | {"quantization": FP8_ALGORITHM}},
    "of the text": {"text_config": {"quantization_config": NEW_FORM}},
}


def weights(**config: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": "float-quantized"} | config


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        *[(form, "modelopt") for form in FP8_FORMS.values()],
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": None}}, "modelopt"),
        ({"quantization_config": {"quantization": {"kv_cache_quant_algo": "FP8"}}}, "modelopt"),
        ({"quantization_config": {"quant_algo": "NVFP4", "group_size": 16}}, "modelopt (NVFP4)"),
        ({"quantization_config": {"quant_algo": "W4A16_AWQ"}}, "modelopt (W4A16_AWQ)"),
        ({"quantization_config": weights()}, "compressed-tensors"),
        ({"compression_config": weights()}, "compressed-tensors"),
        ({"text_config": {"quantization_config": weights()}}, "compressed-tensors"),
        (
            {"quantization_config": weights(format="nvfp4-pack-quantized")},
            "compressed-tensors (nvfp4-pack-quantized)",
        ),
        (
            {"quantization_config": weights(config_groups={"0": {"format": "pack-quantized"}})},
            "compressed-tensors (pack-quantized)",
        ),
        ({"quantization": {"group_size": 64, "bits": 4, "mode": "affine"}}, "MLX"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "MLX"),
        *[
            ({"quantization_config": {"quant_method": name, "bits": 4, "group_size": 128}}, name)
            for name in (
                *("gptq", "awq", "bitsandbytes", "exl2", "exl3", "hqq", "torchao", "quark"),
                *("auto-round", "mxfp4", "fp8", "fbgemm_fp8"),
            )
        ],
    ],
)
def test_the_config_tells_the_method_in_all_forms_that_tools_write(given, method):
    assert method_of(settings(given), ["model.norm.weight"]) == method


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("q_proj.weight_scale_2", "NVFP4"),
        ("q_proj.weight_packed", "compressed-tensors, packed"),
        ("q_proj.qweight", "gptq or awq"),
        ("q_proj.trellis", "exl3"),
        ("q_proj.q_weight", "exl2"),
        ("q_proj.W_q", "hqq"),
        ("q_proj.weight.absmax", "bitsandbytes"),
        ("q_proj.SCB", "bitsandbytes"),
    ],
)
@pytest.mark.parametrize("given", [{}, NEW_FORM], ids=["no config", "a config of another"])
def test_names_of_packed_tensors_tell_the_method_that_the_config_does_not(given, name, method):
    assert method_of(given, [name]) == method


def test_settings_that_are_no_object_are_refused():
    with pytest.raises(CheckpointError, match="quantization_config must be a JSON object, got 'f"):
        settings({"quantization_config": "fp8"})


def test_no_settings_are_left_where_nothing_is_quantised():
    hf = {"quantization": {"bits": 4}, "text_config": {"quantization_config": NEW_FORM, "a": 1}}
    assert without_settings(hf | {"b": 2}) == {"text_config": {"a": 1}, "b": 2}


def write_modelopt(directory: Path, config: dict[str, Any], beside: dict[str, Any]) -> Path:
    """tests/golden/gqa in FP8 with the scales that modelopt adds; its scales are 1/8."""
    directory.mkdir()
    stored, _ = read_headers(weight_files(GOLDEN))
    tensors = {name: tensor[:] for name, tensor in stored.items()}
    scale = np.array(0.125, np.float32)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = (tensors[name].astype(np.float32) * 8).astype(ml_dtypes.float8_e4m3fn)
        end = {"k_proj": ".k_scale", "v_proj": ".v_scale"}.get(name.split(".")[-2])
        part = name.removesuffix(".weight")
        ends = [".weight_scale", ".input_scale", *([end] if end else [])]
        tensors |= {part + end: scale for end in ends}
    save_file(tensors, directory / "model.safetensors")
    hf = read_json(GOLDEN / "config.json")
    (directory / "config.json").write_text(json.dumps(hf | config))
    if beside:
        (directory / BESIDE).write_text(json.dumps(beside))
    return directory


def load(directory: Path) -> dict[str, np.ndarray]:
    policy, mesh = Policy("float32", "float32", make_mesh(1)), make_mesh(1)
    model = loading.load_model(directory, read_config(directory), policy, mesh)
    return {path: np.asarray(param[...]) for path, param in loading.flat_params(model).items()}


@pytest.mark.parametrize("form", [*FP8_FORMS, "beside"])
def test_fp8_of_modelopt_loads_as_what_it_stands_for(tmp_path, form):
    beside = MODELOPT | {"quantization": FP8_ALGORITHM} if form == "beside" else {}
    directory = write_modelopt(tmp_path / "fp8", FP8_FORMS.get(form, {}), beside)
    near, exact = load(directory), load(GOLDEN)
    for path, value in exact.items():
        assert np.allclose(near[path], value, rtol=2**-4, atol=2**-12), path
    assert any((near[path] != value).any() for path, value in exact.items())


def test_a_converted_model_says_nothing_of_what_it_was_quantised_with(tmp_path):
    beside = MODELOPT | {"quantization": FP8_ALGORITHM}
    source = write_modelopt(tmp_path / "fp8", {}, beside)
    assert convert([str(source), str(tmp_path / "orbax")]) == 0
    assert not (tmp_path / "orbax" / BESIDE).exists()
    assert settings(read_hf(tmp_path / "orbax")) == {}
    near = load(tmp_path / "orbax")
    for path, value in load(source).items():
        assert np.array_equal(near[path], value), path


@pytest.mark.parametrize(
    ("config", "names", "method"),
    [
        (
            {"quantization": {"group_size": 64, "bits": 4}},
            ["weight", "scales", "biases"],
            "MLX",
        ),
        (
            {"quantization_config": {"quant_algo": "NVFP4", "group_size": 16}},
            ["weight", "weight_scale", "weight_scale_2", "input_scale"],
            r"modelopt \(NVFP4\)",
        ),
        ({}, ["weight", "weight_scale", "weight_scale_2", "input_scale"], "NVFP4"),
    ],
)
def test_four_bits_are_refused_by_name_not_as_damage(tmp_path, config, names, method):
    part = "model.layers.0.self_attn.q_proj"
    save_file({f"{part}.{n}": np.zeros(4, np.uint8) for n in names}, tmp_path / "model.safetensors")
    hf = read_json(GOLDEN / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(hf | config))
    with pytest.raises(CheckpointError, match=f"quantised with {method}, which .* use the model's"):
        load(tmp_path)
