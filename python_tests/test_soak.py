"""The beginning of the fuzz that `make soak` runs whole, and how it tells what failed."""

from __future__ import annotations

import sys
from collections import Counter

import clce_ext
from tools import soak


def test_random_calls_of_the_loss_hold():
    done, failed = soak.fuzz(first=0, calls=150)
    assert not failed
    assert done["calls"] == 150 and done["compared"] >= 400
    assert all(done[str(dtype).removeprefix("torch.")] > 5 for dtype in soak.DTYPES)


def test_the_fuzz_notices_a_wrong_gradient(monkeypatch):
    right = clce_ext.hard_negative_contrastive_loss

    def wrong(embeddings, *arguments, **options):
        return right(embeddings, *arguments, **options) + 1e-3 * (embeddings - embeddings.detach()).sum()

    monkeypatch.setattr(clce_ext, "hard_negative_contrastive_loss", wrong)
    _, failed = soak.fuzz(first=0, calls=5)
    assert len(failed) >= 3 and all(line.startswith("call ") for line in failed)


def test_a_failure_is_named_and_fails_the_command(monkeypatch, capsys):
    def judge(seed):
        if seed == 8:
            raise AssertionError("an error that is too large")
        return Counter(calls=1)

    monkeypatch.setattr(soak, "judge", judge)
    monkeypatch.setattr(sys, "argv", ["soak.py", "--first", "7", "--calls", "3", "--kills", "0"])
    assert soak.main() == 1
    written = capsys.readouterr()
    assert written.err == "call 8: AssertionError: an error that is too large\n"
    assert "that failed                           1" in written.out
