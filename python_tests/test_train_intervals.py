"""Intervals of differences that are paired by seed and by image, and Holm's correction."""

from __future__ import annotations

import math

import numpy as np
import pytest

from clce_ext.train.intervals import corrected, difference, holm, standard_error
from clce_ext.train.metrics import confidence_interval
from clce_ext.train.report import _standing, _verdict
from clce_ext.train.results import RunRecord, untouched_records


def differences(generator, seeds=5, images=40, of_seeds=0.1, of_images=0.3, noise=0.3):
    """Differences [S, I] around zero with the given spreads of seeds, of images, and of what is left."""
    return (
        of_seeds * generator.standard_normal((seeds, 1))
        + of_images * generator.standard_normal((1, images))
        + noise * generator.standard_normal((seeds, images))
    )


def test_it_is_the_bootstraps_where_seeds_and_images_explain_all():
    """Drawing one seed less than there are makes up for the spread of few seeds around their own mean."""
    generator = np.random.default_rng(0)
    x = differences(generator, seeds=6, noise=0.01)
    means = [x[generator.integers(0, 6, 5)][:, generator.integers(0, 40, 40)].mean() for _ in range(20_000)]
    assert standard_error(x) == pytest.approx(np.std(means), rel=0.03)


def test_its_square_is_unbiased():
    generator = np.random.default_rng(3)
    of_seeds, of_images, noise = 0.1, 0.3, 0.6
    found = [
        standard_error(differences(generator, 5, 40, of_seeds, of_images, noise)) ** 2 for _ in range(4000)
    ]
    assert np.mean(found) == pytest.approx(of_seeds**2 / 5 + of_images**2 / 40 + noise**2 / 200, rel=0.03)


def test_of_seeds_alone_it_is_students():
    values = np.array([0.03, -0.01, 0.02, 0.05])
    assert standard_error(values[:, None]) == pytest.approx(values.std(ddof=1) / 2)
    a, b = records("clce", values), records("ce", np.zeros(4))
    found = difference(a, b, "top1")
    wanted = confidence_interval(values)
    assert (found.mean, found.half_width) == pytest.approx((wanted.mean, wanted.half_width))
    assert found.images is None


@pytest.mark.parametrize("of_images", [0.0, 0.6])
def test_intervals_hold_the_truth_as_often_as_they_say(of_images):
    generator = np.random.default_rng(1)
    within = {"both": 0, "seeds alone": 0}
    for _ in range(1000):
        x = differences(generator, of_images=of_images)
        errors = {"both": standard_error(x), "seeds alone": standard_error(x.mean(axis=1, keepdims=True))}
        for name, error in errors.items():
            within[name] += abs(x.mean()) < 2.776 * error  # Student's t, 4 degrees of freedom
    assert 0.93 < within["both"] / 1000 < 0.99
    # The reason for both: where images differ, the seeds' interval promises far too much.
    assert of_images == 0 or within["seeds alone"] / 1000 < 0.85


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    found = holm([0.01, math.nan, 0.02])
    assert math.isnan(found[1]) and [found[0], found[2]] == pytest.approx([0.02, 0.02])


def records(objective, top1, correct=None, split="test"):
    made = []
    for seed, value in enumerate(top1):
        of = {} if correct is None else {"images": np.arange(correct.shape[1]), "top1": correct[seed]}
        made.append(RunRecord(objective, seed, {"top1": float(value), "split": split}, [], correct=of))
    return made


def test_images_count_where_all_runs_judged_the_same():
    generator = np.random.default_rng(2)
    right = {name: generator.random((3, 50)) < share for name, share in (("clce", 0.8), ("ce", 0.6))}
    a, b = (records(name, of.mean(axis=1), of) for name, of in right.items())
    found = difference(a, b[::-1], "top1")  # paired by seed, not by position
    assert found.images == 50
    assert found.mean == pytest.approx(right["clce"].mean() - right["ce"].mean())
    error = standard_error(right["clce"].astype(float) - right["ce"])
    assert found.half_width == pytest.approx(4.303 * error, rel=1e-3)
    b[1].correct["images"] = b[1].correct["images"] + 1
    assert difference(a, b, "top1").images is None
    b[1].correct = {}
    assert difference(a, b, "top1").images is None


def test_seeds_that_agree_do_not_show_that_chance_is_absent():
    """Each of three seeds has one more of 100 images right, and each another one."""
    right = {"ce": np.zeros((3, 100)), "clce": np.zeros((3, 100))}
    right["clce"][range(3), range(3)] = 1
    a, b = (records(name, of.mean(axis=1), of) for name, of in right.items())
    (found,) = corrected([difference(a, b, "top1")])
    # One of 100 is right in each seed: 0.01 (1 - 0.01) / 300, but for the degrees of freedom.
    assert standard_error(right["clce"]) == pytest.approx(math.sqrt(0.01 * 0.99 / 300), rel=0.03)
    assert found.p > 0.1 and found.verdict == "not distinguishable from"


def test_without_any_variation_there_is_no_interval():
    same = records("clce", [0.41, 0.51, 0.71])  # less 0.4, 0.5 and 0.7 these are equal but for rounding
    for reference in ([0.4, 0.5, 0.7], [0.41, 0.51, 0.71]):
        (found,) = corrected([difference(same, records("ce", reference), "top1")])
        assert math.isnan(found.p) and math.isnan(found.half_width)
        assert found.verdict == "not distinguishable from"
        assert "nothing varies: no interval" in _verdict(found)
        assert "clce not distinguishable from ce" in _standing([found], "ce", "top1")


def test_verdicts_go_by_the_corrected_p():
    sure = difference(records("clce", [0.50, 0.51, 0.52]), records("ce", [0.40, 0.41, 0.421]), "top1")
    unsure = difference(records("schane", [0.44, 0.46, 0.45]), records("ce", [0.40, 0.41, 0.42]), "top1")
    assert unsure.p < 0.05 < 3 * unsure.p
    assert [d.verdict for d in corrected([unsure])] == ["above"]
    assert [d.verdict for d in corrected([sure, unsure, unsure, unsure])] == ["above"] + 3 * [
        "not distinguishable from"
    ]
    one = corrected([difference(records("clce", [0.5]), records("ce", [0.4]), "top1")])[0]
    assert math.isnan(one.half_width) and one.verdict == "not distinguishable from"


def test_the_untouched_backbone_keeps_its_images():
    run = RunRecord(
        "ce",
        0,
        dict.fromkeys(("model", "data", "seed", "classes", "train_images", "split", "images"), 0)
        | {"untouched": {"knn": 0.5}},
        [],
        correct={"images": np.arange(2), "knn": np.ones(2), "untouched.knn": np.array([0, 1])},
    )
    (untouched,) = untouched_records([run])
    assert untouched.results["knn"] == 0.5
    assert {k: list(v) for k, v in untouched.correct.items()} == {"images": [0, 1], "knn": [0, 1]}
