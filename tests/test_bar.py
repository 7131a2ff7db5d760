"""Long work tells how far it is: a bar on a terminal, and a line now and then in a file."""

import io
import sys
import time

import pytest

from reifusion.bar import Bar


class Output(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def said(monkeypatch, terminal: bool, items: int = 12, seconds: float = 0.05, **settings) -> str:
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])  # a clock that the test turns
    out = Output(terminal)
    monkeypatch.setattr(sys, "stderr", out)
    for _ in Bar(range(items), unit="picture", seconds=seconds, **settings):
        now[0] += 0.02
    return out.getvalue()


@pytest.mark.parametrize("leave", [True, False])
def test_in_a_file_there_is_a_line_now_and_then(monkeypatch, leave):
    text = said(monkeypatch, False, leave=leave)
    lines = text.splitlines()
    assert "\r" not in text and text.endswith("\n") and all(lines)
    assert len(lines) == 4 and all("/12" in line and "picture" in line for line in lines)
    if leave:
        assert "12/12" in lines[-1]


def test_in_a_file_short_work_says_nothing(monkeypatch):
    assert said(monkeypatch, False, items=3, seconds=10) == ""


def test_on_a_terminal_the_bar_stays_in_its_line(monkeypatch):
    text = said(monkeypatch, True, mininterval=0)
    assert "\r" in text and "12/12" in text and text.count("\n") == 1


def test_messages_of_a_training_stand_in_lines_of_their_own(monkeypatch):
    out = Output(False)
    monkeypatch.setattr(sys, "stderr", out)
    with Bar(total=4, seconds=0.01) as bar:
        bar.update()
        bar.write("reifusion: step 1: the sheet is here", file=sys.stderr)
        time.sleep(0.02)
        bar.update(3)
    lines = out.getvalue().splitlines()
    assert "reifusion: step 1: the sheet is here" in lines and "\r" not in out.getvalue()
