"""Seconds of a step, against numbers worked by hand."""

import numpy as np
import pytest

from benchmarks.simulation.chips import CHIPS, MODELS, n_cells
from benchmarks.simulation.step_time import LATENCY, Published, Roofline, published_weights
from fastgen_jax.engine.surface import Surface, Work, fit


def decode(n: int, context: int) -> Work:
    return Work(n, n * context, n * context)


def test_models_have_as_many_weights_as_is_known():
    linear = {name: round(model.n_linear / 1e9, 2) for name, model in MODELS.items()}
    assert linear == {
        "llama-2-7b": 6.61, "llama-2-13b": 12.85, "llama-2-70b": 68.71, "llama-3-8b": 7.5,
        "llama-3-70b": 69.5, "mixtral-8x7b": 46.57,
    }  # fmt: skip
    assert round(MODELS["mixtral-8x7b"].n_active / 1e9, 2) == 12.75
    assert MODELS["llama-3-8b"].cell == 128 * 1024
    assert MODELS["llama-2-7b"].cell == 512 * 1024


@pytest.mark.parametrize(("chip", "n", "rate"), [
    ("h200", 1, 284), ("h200", 32, 7100), ("h200", 128, 17100), ("h200", 256, 19900),
    ("h100", 256, 17400), ("v6e", 128, 6520), ("v5e", 128, 3260),
])  # fmt: skip
def test_decoding_llama_3_8b_at_1024_is_bound_as_worked_by_hand(chip, n, rate):
    """Products are max(15 GB / bandwidth, 15 GFLOP n / flops), attention n x 134 MB / bandwidth;
    activations add less than 2 %.
    """
    roofline = Roofline(CHIPS[chip], MODELS["llama-3-8b"])
    assert n / roofline(decode(n, 1024)) == pytest.approx(rate, rel=0.02)


def test_a_prompt_is_bound_by_what_it_computes():
    roofline = Roofline(CHIPS["h100"], MODELS["llama-3-8b"])
    products = 2 * 7.504e9 * 2048 / 989e12  # 31 ms
    attention = 4 * 32 * 32 * 128 * (2048 * 2049 / 2) / 989e12  # 1.1 ms
    activations = 2 * 12 * 32 * 4096 * 2048 / 3.35e12  # 1.9 ms
    seconds = roofline(Work(2048, 2048, 2048 * 2049 / 2))
    assert seconds == pytest.approx(products + attention + activations, rel=0.001)


def test_chips_of_a_replica_share_the_work_and_exchange_what_they_found():
    one, four = (Roofline(CHIPS["a100"], MODELS["llama-2-70b"], n) for n in (1, 4))
    work = decode(64, 2000)
    exchanged = 160 * 1.5 * 64 * 8192 * 2 / 300e9  # 2 a layer, 2 x 3/4 of 1 MB over NVLink
    assert four(work) == pytest.approx(one(work) / 4 + exchanged)
    assert one.exchange(64) == 0


def test_few_tokens_read_few_experts():
    mixtral = MODELS["mixtral-8x7b"]
    assert mixtral.n_read(1) == pytest.approx(mixtral.n_active)
    assert mixtral.n_read(64) == pytest.approx(mixtral.n_linear, rel=0.001)
    share = (mixtral.n_read(4) - mixtral.n_read(0)) / (8 * mixtral.n_expert)
    assert share == pytest.approx(1 - 0.75**4)


def test_weights_must_leave_room_for_a_cache():
    assert n_cells(CHIPS["a100"], MODELS["llama-2-70b"], 4) == pytest.approx(458e3, rel=0.01)
    with pytest.raises(ValueError, match="name more chips"):
        n_cells(CHIPS["a100"], MODELS["llama-2-70b"], 1)


def test_the_published_panels_agree_on_a_model_of_13_billion():
    assert published_weights() == pytest.approx([14.6e9, 13.3e9, 13.2e9], rel=0.01)


def test_the_published_curve_is_met_at_its_points_by_its_own_model():
    curve = Published.scaled("llama-2-13b", 1)
    assert [curve.products[t] for t in LATENCY] == pytest.approx(list(LATENCY.values()))
    assert curve.products[896] == pytest.approx((0.095 + 0.130) / 2)
    assert curve.products == sorted(curve.products)
    scaled = Published.scaled("llama-2-70b", 4)
    assert scaled.products[768] == pytest.approx(0.095 * 68.71 / 4 / 12.85, rel=1e-3)


def test_a_surface_is_found_again_from_its_steps():
    rng = np.random.default_rng(0)
    true = Surface(1e-3, 2e-3, 5e-5, 3e-8, 2e-10, (16, 32, 64, 128, 256))
    tokens = rng.integers(1, 257, 300)
    works = [Work(int(t), c := int(rng.integers(t, 20000)), float(c * t / 4)) for t in tokens]
    seconds = np.array([true(work) for work in works]) * rng.normal(1, 0.01, len(works))
    found = fit(works, seconds.tolist(), true.sizes)
    for work in works:
        assert found(work) == pytest.approx(true(work), rel=0.03)


def test_a_plateau_that_never_ends_is_found_too():
    works = [Work(t, 100 * t, 100.0 * t) for t in range(1, 40)]
    found = fit(works, [0.5] * len(works))
    assert [found(work) for work in works] == pytest.approx([0.5] * len(works), rel=1e-6)
