"""Bars on a terminal, and nothing in a log."""

from __future__ import annotations

import sys

from clce_ext.train.progress import progress, waiting


def test_bars_are_for_terminals(monkeypatch, capsys):
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        for shown in (True, False):
            assert list(progress("judging 3 images", range(3), shown)) == [0, 1, 2]
            with waiting("drawing the report", shown):
                pass
            said = capsys.readouterr().err
            assert (
                ("judging 3 images" in said) == ("drawing the report ..." in said) == (is_terminal and shown)
            )
