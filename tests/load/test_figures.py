"""Pictures show what was measured, point by point."""

import json
import sys

import pytest

from benchmarks.load import figures


def result(label: str, clients: int, *, replicas: int | None = None, **fields) -> dict:
    effective = {"requests_per_second": clients / 2, "attainment": 1.0}
    slow = {"requests_per_second": 1 / clients, "attainment": 0.5}
    return {
        "label": label, "num_clients": clients, "request_rate": None,
        "metadata": {} if replicas is None else {"replicas": str(replicas)},
        "request_throughput": 10.0 - clients, "mean_e2el_ms": 1000.0 * clients,
        "effective_throughput": {"2": effective, "6": slow},
        "p50_token_latency_ms": 1.0 * clients, "p90_token_latency_ms": 2.0 * clients,
        "p95_token_latency_ms": 3.0 * clients, **fields,
    }  # fmt: skip


OURS = [result("ours", n) for n in (4, 1, 2)]
BOTH = [*OURS, result("other", 1), result("other", 2)]


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="the extra bench is not installed")


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(figures.MissingMatplotlib, match=r"pip install 'fastgen-jax\[bench\]'"):
        figures.draw(OURS, tmp_path)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(OURS[0]))
    monkeypatch.setattr(sys, "argv", ["figures", str(path)])
    assert figures.main() == 2
    assert "error: pictures need matplotlib" in capsys.readouterr().err


def test_a_curve_has_the_points_of_each_run_in_order_of_load(matplotlib):
    (axes,) = figures.throughput_latency(BOTH).axes
    ours, other = axes.get_lines()
    assert (list(ours.get_xdata()), list(ours.get_ydata())) == ([9.0, 8.0, 6.0], [1.0, 2.0, 4.0])
    assert (ours.get_label(), other.get_label()) == ("ours", "other")


def test_a_bar_is_the_best_of_the_sweep_and_names_its_load(matplotlib):
    (axes,) = figures.effective_throughput(BOTH).axes
    assert [bar.get_height() for bar in axes.patches] == [2.0, 1.0, 1.0, 1.0]
    assert [text.get_text() for text in axes.texts] == ["2\n@ 4", "1\n@ 1", "1\n@ 2", "1\n@ 1"]


def test_percentiles_are_of_the_greatest_load_that_all_have(matplotlib):
    (axes,) = figures.token_latency(BOTH).axes
    assert [bar.get_height() for bar in axes.patches] == [2.0, 4.0, 6.0] * 2


def test_scaling_is_the_best_of_each_number_of_replicas(matplotlib):
    runs = [result("ours", n, replicas=r, request_throughput=float(n * r))
            for n in (1, 2) for r in (1, 2, 4)]  # fmt: skip
    (axes,) = figures.replica_scaling(runs).axes
    measured, linear = axes.get_lines()
    assert list(measured.get_ydata()) == [2.0, 4.0, 8.0] == list(linear.get_ydata())


def test_every_picture_that_the_results_can_fill_is_written(matplotlib, tmp_path):
    names = {path.name for path in figures.draw(BOTH, tmp_path)}
    assert names == {f"{name}.png" for name in figures.FIGURES}
    scaled = [result("ours", 1, replicas=n) for n in (1, 2)]
    assert len(figures.draw(scaled, tmp_path)) == 4
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


def test_an_open_loops_load_is_its_rate():
    assert figures.load(result("ours", 1) | {"num_clients": None, "request_rate": "2.5"}) == 2.5
