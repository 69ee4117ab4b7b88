"""Engines that are scripts of a few lines: turns, failures, ratios, and what is kept."""

import json
import sys

import pytest

from benchmarks.engine.throughput import Workload
from benchmarks.peers import environments, report
from benchmarks.peers.contest import Contest, Standing, Worker, same_share
from benchmarks.peers.environments import Absent, Peer

ASKED = Workload([[5, 6], [7]], [3, 2])
ECHO = "[[prompt[0]] * n for prompt, n in zip(prompts, n_new)]"
SOURCE = """
import time
from benchmarks.peers.protocol import serve
serve(lambda path, dtype: (f"{path} {dtype}", lambda prompts, n_new, variant: BODY))
"""


@pytest.fixture
def engine(monkeypatch):
    """Makes the worker of a name, of what it gives for `prompts, n_new, variant`."""
    made = []

    def make(name: str, body: str = ECHO, variants: tuple[str, ...] = ("",)) -> Worker:
        monkeypatch.setitem(environments.PEERS, name, Peer(variants=lambda _: list(variants)))
        source = SOURCE.replace("BODY", body)
        made.append(Worker(name, [sys.executable, "-c", source, "model", "float32"]))
        return made[-1]

    yield make
    for worker in made:
        worker.close()


def test_worker_says_what_it_is_and_gives_tokens_and_seconds(engine):
    worker = engine("one")
    assert worker.versions == "model float32"
    turn = worker.run(ASKED)
    assert turn.tokens == [[5, 5, 5], [7, 7]] and 0 < turn.seconds < 60


def test_failing_job_ends_in_its_error_and_the_next_one_runs(engine):
    worker = engine("one", f"1 / 0 if variant == 'bad' else {ECHO}")
    with pytest.raises(Absent, match="ZeroDivisionError"):
        worker.run(ASKED, "bad")
    assert worker.run(ASKED).tokens


def test_other_number_of_tokens_is_a_failure(engine):
    with pytest.raises(Absent, match=r"it gave \[1, 1\] tokens, and \[3, 2\] were asked for"):
        engine("one", "[[1], [1]]").run(ASKED)


def test_process_that_ends_is_absent_with_its_last_line():
    with pytest.raises(Absent, match="No module named 'no_such_engine'"):
        Worker("one", [sys.executable, "-c", "import no_such_engine"])


def test_engines_take_turns_and_who_began_ends_the_next_round(engine, capsys):
    workers = [engine("first"), engine("second"), engine("third")]
    Contest(workers, "float32").standings("2x2+3", [ASKED] * 3)
    said = [line.split()[2][:-1] for line in capsys.readouterr().err.splitlines()]
    assert " ".join(said) == "first second third second third first third first second"


def test_best_variant_of_the_first_round_goes_on(engine):
    slow = f"time.sleep(0.05 * (variant == 'slow')) or {ECHO}"
    workers = [engine("first"), engine("second", slow, ("slow", "quick"))]
    standing = Contest(workers, "float32").standings("2x2+3", [ASKED] * 2)[1]
    assert standing.engine == "second quick" and max(standing.seconds) < 0.05


def test_engine_that_fails_is_out_and_the_others_go_on(engine):
    workers = [engine("first"), engine("second", "1 / 0")]
    first, second = Contest(workers, "float32").standings("2x2+3", [ASKED] * 3)
    assert len(first.seconds) == 3 and not second.seconds
    assert second.why_absent == "ZeroDivisionError: division by zero"


def test_tokens_count_as_the_same_up_to_where_they_part(engine):
    workers = [engine("first"), engine("second", "[[5, 6, 5], [7, 7]]")]
    standings = Contest(workers, "float32").standings("2x2+3", [ASKED])
    assert [standing.same for standing in standings] == [1.0, 3 / 5]
    assert same_share([[1, 2]], [[2, 2]]) == 0.0


STANDINGS = [
    Standing("2x2+3", "float32", "ours", (1.0, 2.0, 4.0), n_new=100, n_prompt=50, same=1.0),
    Standing("2x2+3", "float32", "theirs", (2.0, 3.0, 2.0), n_new=100, n_prompt=50, same=0.25),
    Standing("2x2+3", "float32", "gone", why_absent="no wheel"),
]


def test_ratio_is_of_single_rounds_and_absent_engines_say_why():
    ours, theirs, gone = (list(cells.values())[3:] for cells in report.rows(STANDINGS))
    assert ours == ["50", "75", "1.00 (1.00-1.00)", "100%"]
    assert theirs == ["50", "75", "1.50 (0.50-2.00)", "25%"]  # 2 / 1, 3 / 2, 2 / 4
    assert gone == ["-", "-", "-", "no wheel"]


def test_report_is_kept_with_all_rounds(tmp_path):
    report.save(tmp_path, {"ours": "v1", "gone": "absent: no wheel"}, STANDINGS)
    told = json.loads((tmp_path / "peers.json").read_text())
    assert [found["seconds"] for found in told["rounds"]] == [[1, 2, 4], [2, 3, 2], []]
    text = (tmp_path / "peers.md").read_text()
    assert "| 2x2+3 | float32 | theirs | 50 | 75 | 1.50 (0.50-2.00) | 25% |" in text
    assert "- gone: absent: no wheel" in text
    assert len((tmp_path / "peers.csv").read_text().splitlines()) == 1 + len(STANDINGS)


def test_engine_that_does_not_install_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setitem(environments.PEERS, "none", Peer("--no-index no-such-package-at-all"))
    with pytest.raises(Absent, match=r"it does not install; .*none\.log says why"):
        environments.python_of("none")
    assert "no-such-package-at-all" in (tmp_path / "none.log").read_text()
