"""What benchmarks.chips reckons beside what compilers say."""

import json

import pytest

from benchmarks.chips import Program, binding, measured, n_chips_for, seconds
from benchmarks.gpu.schedule import Figures
from benchmarks.schedules import Kernel, of_floors
from benchmarks.simulation.chips import CHIPS, MODELS
from benchmarks.simulation.step_time import Roofline
from convert.chips import Chips
from fastgen_jax.engine.surface import Work
from fastgen_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("chip", "model", "n"),
    [
        ("h100", "llama-3-8b", 1),  # 16 GB
        ("v5e", "llama-3-8b", 2),
        ("a100", "llama-2-70b", 4),  # 138 GB, and two would have no room for a cache
        ("h200", "mixtral-8x7b", 1),  # 93 GB
    ],
)
def test_fewest_chips_hold_the_weights_and_leave_room(chip, model, n):
    assert n_chips_for(CHIPS[chip], MODELS[model]) == n


def test_model_that_eight_chips_do_not_hold_is_refused():
    with pytest.raises(ConfigError, match="141 GB of weights do not fit into eight chips"):
        n_chips_for(CHIPS["v5e"], MODELS["llama-3-70b"])


def test_layers_that_were_not_compiled_are_as_those_that_were():
    few, more = Program(7, 12, 30, 100, 768, 0.9), Program(7, 20, 50, 140, 768, 0.9)
    assert more.extrapolated(few, 32) == Program(7, 132, 330, 700, 768, 0.9)
    assert more.extrapolated(few, 4) == more


def test_a_few_decodes_wait_for_weights_many_long_ones_for_attention_and_prompts_for_products():
    roofline = Roofline(CHIPS["h100"], MODELS["llama-3-8b"])
    assert binding(roofline, Work(1, 1024, 1024)) == "reading weights"
    assert binding(roofline, Work(256, 256 * 2048, 256 * 2048)) == "attention"
    assert binding(roofline, Work(2048, 2048, 2048 * 1024)) == "products"


def test_what_was_measured_names_its_file(tmp_path):
    told = {"chip": "h100", "model": "llama-3-8b", "decode_tokens_per_second": 123.4}
    (tmp_path / "gpu_check-2026.json").write_text(json.dumps(told))
    assert measured("h100", "llama-3-8b", tmp_path) == "123 (gpu_check-2026.json)"
    assert measured("h200", "llama-3-8b", tmp_path) == "not run"


def test_every_chip_of_the_table_has_a_compiler():
    for chip in CHIPS:
        name = chip if chip in ("a100", "h100", "h200") else f"tpu-{chip.removeprefix('tpu')}"
        assert Chips.of(name).kind == chip


def test_a_kernel_whose_instructions_take_longer_than_its_bytes_slows_attention_down():
    floors = {"bytes": 80.0, "unit": 20.0, "issue": 100.0}
    kernel = of_floors(Figures(0, 0, 0, 1, 4, 0.0, 0.0, {}, floors))
    assert kernel == Kernel(0.8, "issue 1.2x")
    roofline, work = Roofline(CHIPS["h100"], MODELS["llama-3-8b"]), Work(64, 65536, 65536)
    slower = seconds(roofline, work, kernel) - roofline(work)
    assert slower == pytest.approx(roofline.attention(work) / 4)
    assert seconds(roofline, work, kernel._replace(share=1.0)) == roofline(work)
