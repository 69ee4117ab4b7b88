"""python -m convert: there and back, onto any mesh, and never half."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from convert.destination import new_directory
from fastgen_jax import LLM, SamplingParams
from fastgen_jax.built_in import DEMO
from fastgen_jax.checkpoints import loading
from fastgen_jax.checkpoints.converted import MANIFEST, read_manifest
from fastgen_jax.checkpoints.directory import read_config
from fastgen_jax.checkpoints.tensor_files import INDEX, read_headers, weight_files
from fastgen_jax.errors import CheckpointError
from fastgen_jax.models import families
from fastgen_jax.models.layers import Policy
from fastgen_jax.models.sharding import make_mesh

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
LLAMA = GOLDEN / "gqa"


def convert(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "gqa"
    assert convert(LLAMA, directory) == 0
    return directory


def load(directory: Path, n_devices: int = 1, dtype: str = "float32") -> dict[str, jax.Array]:
    policy = Policy(dtype, "float32", make_mesh(n_devices))
    config, mesh = read_config(directory), make_mesh(n_devices)
    model = loading.load_model(directory, config, policy, mesh)
    return {path: param[...] for path, param in loading.flat_params(model).items()}


def bits(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor."""
    stored, problems = read_headers(weight_files(directory))
    assert not problems
    return {n: (t.dtype.name, t.shape, t[:].tobytes()) for n, t in stored.items()}


def test_chat_templates_beside_the_first_one_come_along(tmp_path):
    shutil.copytree(LLAMA, tmp_path / "model")
    template = "additional_chat_templates/tool_use.jinja"
    (tmp_path / "model" / template).parent.mkdir()
    (tmp_path / "model" / template).write_text("{{ messages }}")
    assert convert(tmp_path / "model", tmp_path / "converted") == 0
    assert (tmp_path / "converted" / template).read_text() == "{{ messages }}"
    assert template in read_manifest(tmp_path / "converted")["files"]
    assert convert("--check", tmp_path / "converted") == 0


@pytest.mark.parametrize("name", ["gqa", "sharded", "mixtral", "mqa_tied", "biases"])
def test_there_and_back_is_bit_exact(tmp_path, name):
    assert convert(GOLDEN / name, tmp_path / "orbax") == 0
    assert convert("--check", tmp_path / "orbax") == 0
    assert convert("--to-hf", tmp_path / "orbax", tmp_path / "hf") == 0
    assert bits(tmp_path / "hf") == bits(GOLDEN / name)
    for file in weight_files(GOLDEN / name):
        assert (tmp_path / "hf" / file.name).is_file()
    config = (GOLDEN / name / "config.json").read_bytes()
    assert (tmp_path / "hf" / "config.json").read_bytes() == config


def test_every_family_with_a_golden_comes_back(tmp_path):
    by_family = {}
    for file in sorted(GOLDEN.glob("*/config.json")):
        config = json.loads(file.read_text())
        if "quantization_config" not in config:
            by_family[config["model_type"]] = file.parent
    assert len(by_family) > 3
    for model_type, golden in by_family.items():
        assert convert(golden, tmp_path / model_type) == 0, model_type
        assert convert("--to-hf", tmp_path / model_type, tmp_path / f"{model_type}-hf") == 0
        assert bits(tmp_path / f"{model_type}-hf") == bits(golden), model_type


def test_mixed_dtypes_and_tensors_that_nothing_needs_come_back(tmp_path):
    source = shutil.copytree(LLAMA, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if "k_proj" in name or "mlp" in name:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
        if "v_proj" in name:
            tensors[name] = tensors[name].astype(np.float16)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.arange(4, dtype=np.float32)
    save_file(tensors, source / "model.safetensors")
    assert convert(source, tmp_path / "orbax") == 0
    assert convert("--to-hf", tmp_path / "orbax", tmp_path / "hf") == 0
    assert len({dtype for dtype, _, _ in bits(source).values()}) == 3
    assert bits(tmp_path / "hf") == bits(source)


def test_number_of_files_and_dtype_can_be_chosen(tmp_path, converted):
    assert convert("--to-hf", converted, tmp_path / "hf", "--shards", 3, "--dtype", "float16") == 0
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert {dtype for dtype, _, _ in bits(tmp_path / "hf").values()} == {"float16"}
    want = load(LLAMA, dtype="float16")
    for path, array in load(tmp_path / "hf", dtype="float16").items():
        assert np.array_equal(array, want[path]), path


@pytest.mark.parametrize("n_devices", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_restores_onto_any_mesh_as_from_hugging_face(tmp_path, n_devices, dtype):
    source = shutil.copytree(LLAMA, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    n_heads, head_dim = config["num_attention_heads"], config["head_dim"]
    tensors = load_file(source / "model.safetensors")
    rng = np.random.default_rng(0)
    for name in tensors:  # heads enough for four devices
        if "k_proj" in name or "v_proj" in name:
            shape = (n_heads * head_dim, config["hidden_size"])
            tensors[name] = rng.standard_normal(shape).astype(np.float32)
    save_file(tensors, source / "model.safetensors")
    config["num_key_value_heads"] = n_heads
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "orbax") == 0
    want = load(source, n_devices, dtype)
    for path, array in load(tmp_path / "orbax", n_devices, dtype).items():
        assert array.sharding == want[path].sharding, path
        assert array.dtype == want[path].dtype, path
        assert np.array_equal(array, want[path]), path


@pytest.mark.parametrize("name", ["biases", "olmo2", "qwen2_moe"])
def test_restores_onto_devices_that_nothing_divides_into(tmp_path, name):
    assert convert(GOLDEN / name, tmp_path / "orbax") == 0
    want = load(GOLDEN / name, 5)
    for path, array in load(tmp_path / "orbax", 5).items():
        assert array.sharding == want[path].sharding, path
        assert np.array_equal(array, want[path]), path


def test_parameters_larger_than_the_limit_in_flight_are_read(converted, monkeypatch):
    monkeypatch.setattr("fastgen_jax.checkpoints.converted.MAX_IN_FLIGHT", 1)
    want = load(LLAMA)
    for path, array in load(converted).items():
        assert np.array_equal(array, want[path]), path


def test_experts_restore_onto_two_devices_as_from_hugging_face(tmp_path):
    assert convert(GOLDEN / "mixtral", tmp_path / "orbax") == 0
    want = load(GOLDEN / "mixtral", 2)
    for path, array in load(tmp_path / "orbax", 2).items():
        assert array.sharding == want[path].sharding, path
        assert np.array_equal(array, want[path]), path


def test_llm_takes_the_directory_and_makes_the_same_tokens(tmp_path):
    assert convert(DEMO, tmp_path / "demo") == 0
    params = SamplingParams(max_tokens=12, temperature=0.0)
    texts = []
    for model in (DEMO, tmp_path / "demo"):
        options = {"max_model_len": 64, "num_kv_blocks": 8, "max_num_batched_tokens": 16}
        llm = LLM(str(model), max_num_seqs=2, dtype="float32", **options)
        (result,) = llm.generate(["Once upon a time"], params, use_tqdm=False)
        texts.append(result.outputs[0].token_ids)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 12


def test_quantised_checkpoint_becomes_a_plain_one(tmp_path):
    source = shutil.copytree(LLAMA, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    small = (tensors[name] * 64).clip(-127, 127).astype(np.int8)
    tensors |= {name: small, f"{name}_scale": np.full((len(small), 1), 1 / 64, np.float32)}
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    method = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    assert convert(source, tmp_path / "orbax") == 0
    assert convert("--to-hf", tmp_path / "orbax", tmp_path / "hf") == 0
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="numpy") as opened:
        assert np.array_equal(opened.get_tensor(name).astype(np.float32), small / np.float32(64))


def test_check_names_what_was_changed_and_loading_what_was_cut(tmp_path, converted, capsys):
    broken = shutil.copytree(converted, tmp_path / "broken")
    sizes = {name: size for name, (size, _) in read_manifest(broken)["files"].items()}
    largest = broken / max(sizes, key=sizes.__getitem__)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    (broken / "config.old.json").unlink()
    assert convert("--check", broken) == 1
    message = capsys.readouterr().err
    assert "2 problems" in message
    assert f"checksum: {largest.relative_to(broken)}" in message
    assert "missing: config.old.json" in message
    os.truncate(largest, len(data) - 1)
    with pytest.raises(CheckpointError, match=f"size: {largest.relative_to(broken)} has"):
        load(broken)


def test_check_takes_hugging_face_directories(tmp_path, capsys):
    assert convert("--check", LLAMA) == 0
    broken = shutil.copytree(LLAMA, tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 2000)
    assert convert("--check", broken) == 1
    assert "damaged: model.safetensors" in capsys.readouterr().err


def test_families_are_listed_with_the_keys_that_they_read(capsys):
    assert convert("--list") == 0
    out = capsys.readouterr().out
    assert "llama: Llama 1, 2 and 3" in out
    assert "num_key_value_heads" in out
    assert all(f"{name}: " in out for name in families.FAMILIES)
    assert re.search("one of the above: .*llava, ", out)


def test_existing_destination_is_kept_unless_told_otherwise(tmp_path, capsys):
    destination = tmp_path / "there"
    destination.mkdir()
    (destination / "precious").touch()
    assert convert(LLAMA, destination) == 1
    assert "give --overwrite" in capsys.readouterr().err
    assert convert(LLAMA, destination, "--overwrite") == 1
    assert "no model's directory" in capsys.readouterr().err
    assert [file.name for file in destination.iterdir()] == ["precious"]


def test_failed_conversion_leaves_the_old_one(tmp_path, converted):
    destination = shutil.copytree(converted, tmp_path / "there")
    broken = shutil.copytree(LLAMA, tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 2000)
    assert convert(broken, destination, "--overwrite") == 1
    assert convert("--check", destination) == 0
    assert not (tmp_path / ".there.partial").exists()
    assert convert(LLAMA, destination, "--overwrite") == 0
    assert convert("--check", destination) == 0


# Ends itself as kill -9 would, before a given call that writes.
KILLER = """
import os, signal, sys
import jax
left = int(sys.argv[1])
WRITES = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.copyfile", "os.listdir"}
def count(event, args):
    global left
    if event not in WRITES or destination not in str(args[0]):
        return
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
from convert.__main__ import main
destination = os.path.basename(sys.argv[3])
sys.addaudithook(count)
sys.exit(main([*sys.argv[2:], "--overwrite"]))
"""


def start(*args: object, code: list[str] | None = None) -> subprocess.Popen:
    command = [sys.executable, *(code or ["-m", "convert"]), *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def is_whole_or_absent(destination: Path) -> bool:
    return not destination.exists() or convert("--check", destination) == 0


def test_killed_anywhere_leaves_all_or_nothing_or_the_old_one(tmp_path, converted):
    points = (2, 8, 12, 20, 30, 49, 40, 50, 1000)  # of about 52 calls; 48 and 49 are the renames
    n_killed = n_whole = 0
    for n, n_writes in enumerate(points):
        destination = tmp_path / f"model{n % 2}"
        if n == 1:
            shutil.copytree(converted, destination)
        process = start(n_writes, LLAMA, destination, code=["-c", KILLER])
        process.communicate(timeout=60)
        n_killed += process.returncode == -signal.SIGKILL
        n_whole += destination.exists()
        assert is_whole_or_absent(destination), n_writes
    assert n_killed == len(points) - 1
    assert 3 <= n_whole < len(points)
    assert convert(LLAMA, tmp_path / "model1", "--overwrite") == 0
    assert convert("--check", tmp_path / "model1") == 0


def test_killed_between_the_renames_the_old_one_comes_back(tmp_path, converted):
    shutil.copytree(converted, tmp_path / ".model.old")
    (tmp_path / ".model.partial").mkdir()
    with (
        pytest.raises(CheckpointError, match="exists; give --overwrite"),
        new_directory(tmp_path / "model", overwrite=False),
    ):
        pytest.fail("it was not noticed")
    assert convert("--check", tmp_path / "model") == 0


def test_full_disk_leaves_nothing_behind(tmp_path):
    allowed = subprocess.run(["unshare", "-rm", "true"], capture_output=True)
    if allowed.returncode:
        pytest.skip("no user namespaces here, so no small filesystem")
    model = shutil.copytree(LLAMA, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    size = 2**20 // config["hidden_size"]  # 4 MiB of embeddings
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & {*tensors}:
        tensors[name] = np.ones((size, config["hidden_size"]), np.float32)
    save_file(tensors, model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    (tmp_path / "disk").mkdir()
    script = (
        'mount -t tmpfs -o size=1m tmpfs "$0/disk" && "$1" -m convert "$0/model" "$0/disk/out";'
        ' code=$?; ls -A "$0/disk"; df --output=used "$0/disk" | tail -1; exit $code'
    )
    command = ["unshare", "-rm", "bash", "-c", script, str(tmp_path), sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "error: " in done.stderr
    *left, used = done.stdout.split()
    assert left == [".out.lock"]
    assert int(used) == 0


def test_of_two_converters_one_wins(tmp_path):
    destination = tmp_path / "model"
    with new_directory(destination, overwrite=False) as growing:
        assert convert(LLAMA, destination) == 1
        assert growing.is_dir()
        shutil.copyfile(LLAMA / "config.json", growing / "config.json")
    assert [file.name for file in destination.iterdir()] == ["config.json"]


def test_of_two_converters_started_together_one_result_is_whole(tmp_path):
    both = [start(LLAMA, tmp_path / "model") for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    assert any("another conversion" in error or "exists" in error for error in errors)
    assert convert("--check", tmp_path / "model") == 0


def test_manifest_says_where_the_weights_came_from(converted):
    manifest = read_manifest(converted)
    assert manifest["source"]["name"] == str(LLAMA)
    size = (LLAMA / "model.safetensors").stat().st_size
    assert manifest["source"]["files"] == {"model.safetensors": size}
    assert set(manifest["source"]["versions"]) >= {"jax", "orbax-checkpoint"}
    assert MANIFEST not in manifest["files"]


@pytest.mark.parametrize("args", [(), ("a",), ("--check", "a", "b"), ("--to-hf", LLAMA, "b")])
def test_wrong_arguments_say_what_to_give(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert(*args) == 1
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
