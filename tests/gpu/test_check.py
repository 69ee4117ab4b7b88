"""The script for a GPU machine, at toy size on CPU: its table, and how it bears what goes wrong."""

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pallas_kernels
from benchmarks.gpu import check, kernels, numerics
from benchmarks.gpu.check import Started, exit_code, finish, run_section
from benchmarks.gpu.table import TOY, Ceilings, Row, ceilings, duration, table
from tests.pallas_kernels.attention_cases import Case, Mismatch

ROOT = Path(__file__).parents[2]
MEASURED = Ceilings(n_bytes=4e12, n_flops=8e14)


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--toy", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def cells(text: str, section: str) -> list[list[str]]:
    """The table's rows of a section."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return [row for row in rows if row and row[0] == section]


def test_script_runs_to_the_end_without_a_gpu(tmp_path: Path):
    out = tmp_path / "results" / "toy.md"
    done = run_script("--sections", "ceilings,torch", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "Toy size on CPU: times mean nothing." in done.stdout
    assert [row[1] for row in cells(done.stdout, "ceilings")] == [
        *("copy, 1 MiB", "add one, 1 MiB", "bfloat16 matmul 64"),
    ]
    assert cells(done.stdout, "torch")
    assert out.read_text().strip() == done.stdout.strip()


def test_numerics_that_were_not_started_make_the_script_fail():
    done = run_script("--sections", "numerics,decode", "--seconds", "1")
    assert done.returncode == 1, done.stderr
    assert "**FAILED** not started" in cells(done.stdout, "numerics")[0][-1]
    assert cells(done.stdout, "decode")[0][-1].startswith("not started")


def test_unknown_section_is_refused_by_name():
    done = run_script("--sections", "numerics,speed")
    assert done.returncode == 2
    assert "unknown sections: speed" in done.stderr


def start_process(folder: Path, code: str, *, seconds: float) -> Started:
    """A section's process that leaves one row and then does what `code` says."""
    (folder / "rows").write_text('["before"]\n')
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stderr=log)
    return Started("decode", process, folder, time.monotonic() + seconds)


def test_section_that_dies_keeps_its_rows_and_tells_its_last_words(tmp_path: Path):
    rows = finish(start_process(tmp_path, "raise MemoryError('the pool')", seconds=60))
    assert rows == [
        Row("before"),
        Row("error", note="MemoryError: the pool", is_ok=False),
    ]


def test_section_over_its_time_is_stopped_and_keeps_its_rows(tmp_path: Path):
    started = start_process(tmp_path, "import time; time.sleep(600)", seconds=0)
    rows = finish(started)
    assert started.process.returncode == -9
    assert rows == [Row("before"), Row("error", note="stopped, its time was over", is_ok=False)]


def test_error_in_a_section_becomes_its_last_row(monkeypatch):
    def broken(sizes):
        yield Row("before")
        raise ValueError("wrong\nsecond line")

    monkeypatch.setattr(kernels, "ceilings", broken)
    rows = run_section("ceilings", TOY)
    assert next(rows) == Row("before")
    assert next(rows) == Row("error", note="ValueError: wrong", is_ok=False)
    with pytest.raises(ValueError, match="wrong"):  # and the process fails
        next(rows)


def test_wrong_kernel_fails_the_numerics(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(numerics, "backends", lambda sizes: {"pallas_gpu": broken})
    *_, wrong, summary = numerics.numerics(TOY)
    assert wrong.note == "RuntimeError: no such kernel"
    assert summary.note == "0 of 1 cases match the float64 oracle"
    assert exit_code({"numerics": [summary]}) == 1
    assert exit_code({"numerics": [Row("all", note="1 of 1")]}) == 0


def test_backend_without_its_packages_is_skipped_with_the_reason(monkeypatch):
    def select(name):
        raise ImportError(f"{name} needs triton")

    monkeypatch.setattr(numerics, "select", select)
    assert numerics.missing("jax_triton", TOY) == "jax_triton needs triton"


def check_far(function) -> None:
    case = Case(n_cells=64, n_tokens=32, n_rows=4, longest=256)
    numerics._check_far(function, case, [(200, 1), (250, 20)], n_blocks=60)


def test_far_blocks_are_reached_and_others_left_alone():
    xla = pallas_kernels.select("xla")

    def stray(*arguments, **options):
        out, cache = xla(*arguments, **options)
        return out, cache.at[7].set(1.0)

    check_far(xla)
    with pytest.raises(Mismatch, match="blocks of no sequence have changed"):
        check_far(stray)


THUNKS = """\
000: kCommandBuffer [source | sink]
    001: kCustomKernel [source       | next=002 (1)] input_scatter_fusion
    002: kCustomKernel [prev=001 (1) | sink        ] attention_decode
003: kCustomCall [source | sink] triton_kernel_call
"""


def test_launches_in_cuda_graphs_are_counted():
    assert kernels.captured(THUNKS) == "2 of 3 launches in command buffers, of which there are 1"
    without = "0 of 1 launches in command buffers, of which there are 0"
    assert kernels.captured("000: kGemm [source | sink]\n") == without


def line(**row) -> list[str]:
    """The only line of a table."""
    text = table([("decode", Row("B=1", **row))], MEASURED)
    return [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]


def test_rate_and_share_follow_from_bytes_and_time():
    assert line(seconds=1e-3, n_bytes=2e9)[2:] == ["1.00 ms", "2000 GB/s", "50 %", "", ""]
    assert line(seconds=0.01, n_flops=4e12, n_tokens=7)[3] == "400 TFLOP/s, 700 tok/s"
    assert line(seconds=0.01, n_bytes=4e9, n_flops=4e12)[4] == "50 %"  # what binds


def test_target_is_met_or_missed():
    share, rate = {"n_bytes": 3e9, "min_share": 0.75}, {"n_flops": 7e12, "min_tflops": 350.0}
    assert line(seconds=1e-3, **share)[5] == "75 %: met"
    assert line(seconds=1.01e-3, **share)[5] == "75 %: missed"
    assert line(seconds=0.02, **rate)[5] == "350 TFLOP/s: met"
    assert line(seconds=0.0201, **rate)[5] == "350 TFLOP/s: missed"


def test_share_needs_a_measured_ceiling():
    text = table([("decode", Row("B=1", 1e-3, n_bytes=3e9, min_share=0.75))], Ceilings())
    assert "75 %: no ceiling" in text


def test_failed_row_has_no_rates_and_stays_one_line():
    found = line(note="a | b\nc", is_ok=False, min_tflops=350.0)
    assert found[2:] == ["", "", "", "", "**FAILED** a / b c"]


def test_best_rates_are_the_ceilings():
    rows = [Row("copy", 2.0, n_bytes=6.0), Row("add", 1.0, n_bytes=4.0), Row("dot", 1.0, n_flops=9)]
    assert ceilings(rows) == Ceilings(4.0, 9.0)
    assert ceilings([]) == Ceilings()


def test_times_come_in_the_unit_that_fits():
    assert [duration(x) for x in (0.0, 2e-6, 0.0123, 75.0)] == ["", "2.0 us", "12.30 ms", "75.00 s"]


def test_every_section_exists():
    for section in check.SECTIONS.values():
        module = importlib.import_module(f"benchmarks.gpu.{section.module}")
        assert callable(getattr(module, section.function))
