"""Loading: foreign headers, all problems at once, quantised checkpoints."""

import json
import os
import random
import re
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from fastgen_jax.checkpoints import loading
from fastgen_jax.checkpoints.directory import read_config
from fastgen_jax.checkpoints.tensor_files import INDEX, read_header, read_headers, weight_files
from fastgen_jax.errors import CheckpointError, ConfigError
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.sharding import make_mesh
from tests.tiny import write_config

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
Q = "model.layers.0.self_attn.q_proj.weight"
FP8, INT8 = ml_dtypes.float8_e4m3fn, np.int8


def write_file(path: Path, header: object, data: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def llama_tensors() -> dict[str, np.ndarray]:
    """Of tests.tiny.CONFIG, random."""
    rng = np.random.default_rng(0)
    shapes = {"embed_tokens.weight": (62, 32), "norm.weight": (32,)}
    for i in range(2):
        layer = {
            **{f"self_attn.{name}_proj": (32, 32) for name in "qo"},
            **{f"self_attn.{name}_proj": (16, 32) for name in "kv"},
            **{f"mlp.{name}_proj": (64, 32) for name in ("gate", "up")},
            **{"mlp.down_proj": (32, 64)},
            **{f"{name}_layernorm": (32,) for name in ("input", "post_attention")},
        }
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return {f"model.{n}": rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def write_model(directory: Path, tensors: dict[str, np.ndarray], **config) -> Path:
    write_config(directory, **config)
    save_file(tensors, directory / "model.safetensors")
    return directory


def load(directory: Path, n_devices: int = 1, dtype: str = "float32", **options):
    policy = Policy(dtype, "float32", make_mesh(n_devices))
    config, mesh = read_config(directory), make_mesh(n_devices)
    return loading.flat_params(loading.load_model(directory, config, policy, mesh, **options))


def errors_of(directory: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        load(directory)
    return str(raised.value)


@pytest.mark.parametrize(
    ("header", "data", "expected"),
    [
        ({"t": ENTRY}, bytes(23), "t: ends at byte"),
        ({"t": ENTRY}, bytes(25), "1 bytes follow the last tensor, t"),
        ({"t": ENTRY, "u": ENTRY}, bytes(24), "overlaps"),
        ({"t": ENTRY, "u": ENTRY | {"data_offsets": [12, 36]}}, bytes(36), "u: overlaps t"),
        ({"t": ENTRY, "u": ENTRY | {"data_offsets": [25, 49]}}, bytes(49), "u: leaves a gap"),
        ({"t": ENTRY | {"data_offsets": [-24, 0]}}, bytes(24), "t: impossible"),
        ({"t": ENTRY | {"data_offsets": [24, 0]}}, bytes(24), "t: F32 .* takes 24 bytes"),
        ({"t": ENTRY | {"data_offsets": [0, 20]}}, bytes(20), "t: F32 .* takes 24 bytes"),
        ({"t": ENTRY | {"data_offsets": [0]}}, bytes(24), "t: impossible"),
        ({"t": ENTRY | {"shape": [2**40, 2**40]}}, bytes(24), "t: F32 .* takes"),
        ({"t": ENTRY | {"shape": [-2, -3]}}, bytes(24), "t: impossible"),
        ({"t": ENTRY | {"shape": [True, 6]}}, bytes(24), "t: impossible"),
        ({"t": ENTRY | {"shape": 6}}, bytes(24), "t: impossible"),
        ({"t": ENTRY | {"dtype": "F31"}}, bytes(24), "t: unknown dtype 'F31'"),
        ({"t": ENTRY | {"dtype": ["F32"]}}, bytes(24), "t: unknown dtype"),
        ({"t": 7}, bytes(24), "t: its entry is no JSON object"),
        ([1], bytes(24), "no JSON object"),
        (b'{"t": {"dtype": "F32"}, "t": 1}', b"", "'t' twice"),
        (b"[" * 100_000, b"", "recursion"),
        (b"\xff\xfe", b"", "utf-8"),
        (b"{", b"", "line 1"),
    ],
)  # fmt: skip
def test_impossible_header_is_named(tmp_path, header, data, expected):
    file = write_file(tmp_path / "model.safetensors", header, data)
    _, problems = read_headers([file])
    assert len(problems) == 1
    assert problems[0].startswith("damaged: model.safetensors: ")
    assert re.search(expected, problems[0]), problems


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 200])
def test_header_longer_than_the_file_or_the_limit_is_refused_unread(tmp_path, length):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", length))
        opened.truncate(150_000_000 if length > 10**8 else 100)
    with pytest.raises(ValueError, match=f"claims {length} bytes"):
        read_header(file)


def test_file_cut_anywhere_is_refused(tmp_path):
    whole = write_file(tmp_path / "whole.safetensors", {"t": ENTRY, "__metadata__": {}})
    assert read_headers([whole])[1] == []
    data, cut = whole.read_bytes(), tmp_path / "cut.safetensors"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        assert read_headers([cut])[1], length


def test_header_with_random_bytes_is_read_alike_by_safetensors_or_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    data = write_file(file, {"t": ENTRY}).read_bytes()
    rng, n_refused = random.Random(0), 0
    for _ in range(400):
        changed = bytearray(data)
        changed[rng.randrange(len(data) - 24)] = rng.randrange(256)
        file.write_bytes(changed)
        tensors, problems = read_headers([file])
        n_refused += bool(problems)
        if not problems:
            with safe_open(file, framework="numpy") as opened:
                assert {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys()} == {  # noqa: SIM118
                    name: tensor.shape for name, tensor in tensors.items()
                }
    assert n_refused > 200


def test_all_problems_come_together_with_file_and_tensor(tmp_path):
    tensors = llama_tensors()
    del tensors[Q]
    tensors["model.extra"] = np.zeros(3, np.float32)
    tensors["model.norm.weight"] = np.zeros(31, np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((64, 32), np.int32)
    tensors["model.layers.0.mlp.up_proj.bias"] = np.zeros(64, np.float32)
    text = errors_of(write_model(tmp_path, tensors))
    assert "5 problems" in text
    assert f"missing: {Q}" in text
    assert "unused: model.extra in model.safetensors" in text
    assert "shape: model.norm.weight in model.safetensors is (31,), the config wants (32,)" in text
    assert "dtype: model.layers.1.mlp.up_proj.weight in model.safetensors is int32" in text
    assert "unused: model.layers.0.mlp.up_proj.bias" in text


def test_damaged_shard_and_missing_tensor_come_together_before_memory_is_taken(
    tmp_path, monkeypatch
):
    tensors = llama_tensors()
    del tensors[Q]
    names = list(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    write_config(tmp_path)
    for file, mine in shards.items():
        save_file({name: tensors[name] for name in mine}, tmp_path / file)
    index = {"weight_map": {name: file for file, mine in shards.items() for name in mine}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with (tmp_path / "model-2.safetensors").open("r+b") as opened:
        opened.truncate(os.path.getsize(opened.name) - 8)
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("device memory was taken"))
    text = errors_of(tmp_path)
    assert "2 problems" in text
    assert re.search("damaged: model-2.safetensors: model.*: ends at byte", text)
    assert f"missing: {Q}" in text


def test_file_that_shrinks_after_the_check_is_an_error(tmp_path):
    directory = write_model(tmp_path, llama_tensors())
    stored, problems = read_headers(weight_files(directory))
    assert not problems
    os.truncate(directory / "model.safetensors", 5000)
    last = max(stored.values(), key=lambda tensor: tensor.offset)
    with pytest.raises(CheckpointError, match=f"cut off while it was read, at tensor {last.name}"):
        last[:]


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x\0.safetensors", "..", 7]
)
def test_index_that_leaves_the_directory_is_refused(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"t": name}}))
    with pytest.raises(CheckpointError, match=r"is no \.safetensors file of this"):
        weight_files(tmp_path)


def test_links_as_in_the_cache_of_the_hub_are_followed(tmp_path):
    blob = write_model(tmp_path / "blobs", llama_tensors()) / "model.safetensors"
    directory = Path(write_config(tmp_path / "snapshot"))
    (directory / "model.safetensors").symlink_to(Path("../blobs") / blob.name)
    assert load(directory)


def test_a_second_copy_of_the_weights_is_not_read(tmp_path):
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in [*shards, "consolidated.safetensors", ".model.safetensors"]:
        (tmp_path / name).touch()
    assert [path.name for path in weight_files(tmp_path)] == shards
    (tmp_path / "model.safetensors").touch()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys("ab", shards[0])}))
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pytorch_model.bin", "pickle, which can run code"),
        ("consolidated.00.pth", "pickle, which can run code"),
        ("model.gguf", "GGUF"),
    ],
)
def test_other_formats_are_refused_with_the_reason(tmp_path, name, reason):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} is a.*{reason}"):
        weight_files(tmp_path)


def test_progress_is_monotonic_and_reaches_the_total(tmp_path):
    seen = []
    load(write_model(tmp_path, llama_tensors()), on_progress=lambda *step: seen.append(step))
    assert [done for done, _ in seen] == [*range(len(seen))]
    assert seen[-1][0] == seen[-1][1] > 10


def test_transform_sees_each_parameter_on_the_host_before_it_is_moved(tmp_path):
    seen = {}

    def transform(path, array):
        seen[path] = type(array)
        return array.astype(ml_dtypes.bfloat16)

    params = load(write_model(tmp_path, llama_tensors()), transform=transform)
    assert set(seen) == set(params)
    assert set(seen.values()) == {np.ndarray}
    assert {param[...].dtype.name for param in params.values()} == {"bfloat16"}


def test_reading_in_small_pieces_gives_the_same_parameters(tmp_path, monkeypatch):
    directory = write_model(tmp_path, llama_tensors())
    whole = load(directory)
    monkeypatch.setattr(loading.weights, "MAX_PIECE", 7)
    monkeypatch.setattr(loading, "MAX_IN_FLIGHT", 1)
    for path, param in load(directory).items():
        assert np.array_equal(param[...], whole[path][...]), path


def quantise(weight: np.ndarray, scale: np.ndarray, dtype) -> tuple[np.ndarray, np.ndarray]:
    """A matrix in 8 bits, and what it then stands for; scale has the matrix's shape."""
    small = weight / scale
    small = np.rint(small).clip(-127, 127) if dtype is INT8 else small.clip(-448, 448)
    small = small.astype(dtype)
    return small, small.astype(np.float32) * scale


def spread(scale: np.ndarray, shape: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    return np.kron(scale, np.ones(block, np.float32))[: shape[0], : shape[1]]


# Name -> (quantization_config, ending of the scale's name, shape of scales, block, dtype).
CASES = {
    "int8 per channel": (
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        "scale", (32, 1), (1, 32), INT8,
    ),
    "int8 in groups": (
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        "scale", (32, 4), (1, 8), INT8,
    ),
    "fp8 per channel": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        "scale", (32, 1), (1, 32), FP8,
    ),
    "fp8 per tensor": ({"quant_method": "fp8"}, "scale", (1,), (32, 32), FP8),
    "fp8 blocks": (
        {"quant_method": "fp8", "weight_block_size": [16, 16]}, "scale_inv", (2, 2), (16, 16), FP8,
    ),
    "fp8 blocks, the last one smaller": (
        {"quant_method": "fp8", "weight_block_size": [24, 24]}, "scale_inv", (2, 2), (24, 24), FP8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_quantised_weight_loads_as_what_it_stands_for(tmp_path, case):
    config, ending, scale_shape, block, dtype = CASES[case]
    tensors, rng = llama_tensors(), np.random.default_rng(1)
    scale = rng.uniform(0.01, 0.02, scale_shape).astype(np.float32)
    full = spread(scale.reshape((*scale_shape, 1)[:2]), (32, 32), block)
    small, meant = quantise(tensors[Q], full, dtype)
    assert np.abs(meant - tensors[Q]).max() > 0
    plain = load(write_model(tmp_path / "plain", tensors | {Q: meant}))
    extra = {f"{Q}_{ending}": scale, Q.replace("weight", "input_scale"): scale[:1]}
    directory = write_model(
        tmp_path / "small", tensors | {Q: small} | extra, quantization_config=config
    )
    for path, param in load(directory).items():
        assert np.array_equal(param[...], plain[path][...]), path


def test_zero_points_are_subtracted(tmp_path):
    tensors = llama_tensors()
    scale, zero = np.full((32, 1), 0.05, np.float32), np.full((32, 1), 3, np.int8)
    small = np.random.default_rng(2).integers(-127, 127, (32, 32), np.int8)
    meant = (small.astype(np.float32) - 3) * scale
    plain = load(write_model(tmp_path / "plain", tensors | {Q: meant}))
    directory = write_model(
        tmp_path / "small",
        tensors | {Q: small, f"{Q}_scale": scale, f"{Q}_zero_point": zero},
        quantization_config={"quant_method": "compressed-tensors", "format": "int-quantized"},
    )
    path = "layers.0.attention.qkv.weight"
    assert np.array_equal(load(directory)[path][...], plain[path][...])


def test_scales_that_do_not_cover_the_weight_are_named(tmp_path):
    small = {Q: np.zeros((32, 32), FP8), f"{Q}_scale_inv": np.ones((3, 2), np.float32)}
    config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    text = errors_of(write_model(tmp_path, llama_tensors() | small, quantization_config=config))
    assert f"quantised: {Q} in model.safetensors: scales (3, 2) do not cover" in text


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ],
    ids=lambda config: config["quant_method"],
)
def test_other_quantisations_are_refused_by_name(tmp_path, config):
    text = errors_of(write_model(tmp_path, llama_tensors(), quantization_config=config))
    assert f"quantised with {config['quant_method']}" in text
    assert "use the model's unquantised checkpoint" in text
    assert "missing" not in text


def test_packed_weights_without_a_config_are_recognised(tmp_path):
    packed = {Q.replace("weight", "qweight"): np.zeros((4, 32), np.int32)}
    assert "gptq or awq" in errors_of(write_model(tmp_path, llama_tensors() | packed))


def test_adapter_that_is_not_merged_is_refused_with_what_to_do(tmp_path):
    name = f"base_model.model.{Q.removesuffix('weight')}lora_A.weight"
    text = errors_of(write_model(tmp_path, llama_tensors() | {name: np.zeros((4, 32), np.float32)}))
    assert f"{name} in model.safetensors belongs to an adapter" in text
    assert "merge_and_unload" in text


def test_folder_of_an_adapter_alone_is_refused_with_its_base_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ConfigError, match=r"holds an adapter .*base model 'org/base'.*merge_and"):
        read_config(tmp_path)


def test_tensor_under_two_names_is_refused_with_both(tmp_path):
    tensors = llama_tensors()
    text = errors_of(write_model(tmp_path, tensors | {f"module.{Q}": tensors[Q]}))
    assert f"twice: {Q} and module.{Q} are both {Q}" in text


def test_compiled_and_wrapped_model_loads_as_the_plain_one(tmp_path):
    tensors = llama_tensors()
    wrapped = {
        n.replace("model.layers.", "module.model.layers.").replace(".mlp.", "._orig_mod.mlp."): t
        for n, t in tensors.items()
    }
    wrapped["module.model.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    plain = load(write_model(tmp_path / "plain", tensors))
    for path, param in load(write_model(tmp_path / "wrapped", wrapped)).items():
        assert np.array_equal(param[...], plain[path][...]), path


def test_stored_head_that_is_not_the_embedding_is_not_dropped(tmp_path):
    tensors = llama_tensors()
    embedding = tensors["model.embed_tokens.weight"]
    same = write_model(tmp_path / "same", tensors | {"lm_head.weight": embedding})
    assert "lm_head.weight" not in load(same)
    other = write_model(tmp_path / "other", tensors | {"lm_head.weight": embedding[::-1].copy()})
    assert "the head in model.safetensors is not the embedding" in errors_of(other)
    own = read_config(other, {"tie_word_embeddings": False})
    overrides = {"tie_word_embeddings": False}
    model = loading.load_model(other, own, Policy(), make_mesh(1), overrides=overrides)
    head = loading.flat_params(model)["lm_head.weight"][...]
    assert np.array_equal(head, embedding[::-1])
