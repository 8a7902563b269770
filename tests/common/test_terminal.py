"""What a terminal gets, and a log."""

import sys

from cera_train.common.terminal import ProgressBar
from cera_train.data.look import print_example


def test_a_terminal_without_a_cursor_gets_the_lines_of_a_log(monkeypatch, capsys):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    monkeypatch.setenv("TERM", "dumb")
    bar = ProgressBar("update", 1, 0)
    bar.step("loss 0.5")
    bar.close()
    assert capsys.readouterr().out == "update 1/1  loss 0.5\n"


def test_what_is_supervised_is_marked(capsys):
    print_example([("Question:", False), (" a\nb", True)])
    assert capsys.readouterr().out == "example    Question:[[ a\n           b]]\n"
