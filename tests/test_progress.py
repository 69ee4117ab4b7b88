"""Progress bars of a start."""

import io
import sys

from fastgen_jax.progress import PhaseBars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(bars: PhaseBars) -> None:
    for done in range(4):
        bars("loading", done, 3)
    bars("compiling", 0, 9)
    bars("compiling", 9, 9)
    bars("ready", 1, 1)
    bars.close()


def test_each_phase_has_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    play(PhaseBars())
    text = sys.stderr.getvalue()
    assert "loading: 100%" in text
    assert "compiling: 100%" in text
    assert "9/9" in text
    assert "ready" not in text


def test_nothing_is_printed_into_a_log(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    play(PhaseBars())
    assert sys.stderr.getvalue() == ""
