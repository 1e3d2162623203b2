"""Measures of embeddings against brute force, on data whose answer is known."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
from scipy import stats

from clce_ext.train import metrics
from clce_ext.train.errors import TrainingError


@pytest.fixture
def generator():
    return np.random.default_rng(7)


def clusters(generator, classes=6, per_class=30, width=8, noise=0.05):
    centres = generator.normal(size=(classes, width))
    labels = np.repeat(np.arange(classes), per_class)
    return centres[labels] + noise * generator.normal(size=(len(labels), width)), labels


def test_alignment_and_uniformity_by_brute_force(generator):
    x, labels = generator.normal(size=(40, 5)), generator.integers(4, size=40)
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    squared = ((z[:, None] - z[None]) ** 2).sum(-1)
    others = ~np.eye(40, dtype=bool)
    same = (labels[:, None] == labels) & others
    assert metrics.alignment(x, labels) == pytest.approx(squared[same].mean(), rel=1e-10)
    assert metrics.uniformity(x) == pytest.approx(np.log(np.exp(-2 * squared[others]).mean()), rel=1e-10)
    x[:9] = z[:9] = 0  # as behind a ReLU whose outputs have died
    squared = ((z[:, None] - z[None]) ** 2).sum(-1)
    assert metrics.alignment(x, labels) == pytest.approx(squared[same].mean(), rel=1e-10)


def test_uniformity_in_blocks(generator, monkeypatch):
    x = generator.normal(size=(50, 4))
    whole = metrics.uniformity(x)
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    assert metrics.uniformity(x) == pytest.approx(whole, rel=1e-12)


def test_isotropy_of_a_ball_and_of_a_cone(generator):
    ball = generator.normal(size=(4000, 4))
    cone = ball + np.array([6.0, 0, 0, 0])
    assert metrics.isotropy(ball) > 0.9
    assert metrics.isotropy(cone) < 0.2


def test_silhouette_and_its_limits(generator):
    x, labels = clusters(generator)
    assert metrics.silhouette(x, labels) > 0.9
    assert metrics.silhouette(x, generator.permutation(labels)) < 0.1
    assert math.isnan(metrics.silhouette(x, np.zeros(len(x), int)))


def test_every_pair_has_its_cosine_once(generator):
    x, labels = generator.normal(size=(25, 3)), generator.integers(3, size=25)
    wanted = {True: [], False: []}
    for i in range(25):
        for j in range(i):
            cosine = x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
            wanted[labels[i] == labels[j]].append(cosine)
    within, between = metrics.pair_cosines(x, labels)
    assert np.allclose(sorted(within), sorted(wanted[True]))
    assert np.allclose(sorted(between), sorted(wanted[False]))
    # Of images that all look alike, which rounding must not put beyond the end of a histogram.
    within, _ = metrics.pair_cosines(np.repeat(x, 3, 0), np.repeat(np.arange(25), 3))
    assert within.shape == (75,) and np.allclose(within, 1) and within.max() <= 1


def test_neighbours_and_centroids(generator):
    x, labels = clusters(generator)
    order = generator.permutation(len(x))
    train, test = order[:90], order[90:]
    shuffled = generator.permutation(labels)
    for correct in (metrics.knn_correct, metrics.centroid_correct, metrics.probe_correct):
        assert correct((x[train], labels[train]), (x[test], labels[test])).mean() > 0.99
        assert correct((x[train], shuffled[train]), (x[test], shuffled[test])).mean() < 0.5


def test_confidence_interval_against_scipy():
    values = np.array([0.91, 0.88, 0.93, 0.90])
    found = metrics.confidence_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert math.isnan(metrics.confidence_interval(np.array([0.5])).half_width)


def test_few_shot_episodes(generator):
    x, labels = clusters(generator, noise=0.6)
    one, five = (metrics.few_shot_episodes((x, labels), np.arange(6), 5, shots, 15, 40) for shots in (1, 5))
    for head in ("centroid", "logistic"):
        assert 0.5 < one[head].mean < five[head].mean <= 1.0
        assert 0 < five[head].half_width < 0.08 and five[head].count == 40
    chance = metrics.few_shot_episodes((x, generator.permutation(labels)), np.arange(6), 5, 1, 15, 40)
    assert abs(chance["centroid"].mean - 0.2) < 0.05
    assert metrics.few_shot_episodes((x, labels), np.arange(6), 5, 1, 15, 40) == one


def test_few_shot_episodes_need_enough_classes():
    labels = np.repeat(np.arange(3), [30, 30, 18])
    with pytest.raises(TrainingError, match="at least 5 classes of 20 images; 2 of 3 classes"):
        metrics.episode_classes(labels, ways=5, shots=5, queries=15, names="abc")
    with pytest.raises(TrainingError, match=r"0 of 3 classes are large enough, too small are a \(30\), b"):
        metrics.episode_classes(labels, ways=2, shots=20, queries=15, names="abc")
    large, small = metrics.episode_classes(labels, ways=2, shots=5, queries=15, names="abc")
    assert large.tolist() == [0, 1] and small == ["c (18)"]


def test_neighbours_vote_as_in_dinos_protocol(generator):
    x, labels = generator.normal(size=(60, 5)), generator.integers(4, size=60)
    query, truth = generator.normal(size=(25, 5)), generator.integers(4, size=25)
    z, q = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, query))
    wanted = []
    for row in q:
        cosines = z @ row
        votes = np.zeros(4)
        for i in np.argsort(-cosines)[:20]:
            votes[labels[i]] += np.exp(cosines[i] / 0.07)
        wanted.append(votes.argmax())
    assert np.array_equal(metrics.knn_correct((x, labels), (query, truth)), np.array(wanted) == truth)


@pytest.mark.parametrize("measure", [metrics.knn_correct, metrics.centroid_correct])
def test_processes_that_share_the_training_images_find_what_one_finds(generator, measure):
    """Whatever a share holds: a class that no other has, or nothing. Only neighbours and sums are sent."""
    x, labels = clusters(generator, noise=1.5)
    x, labels, query, truth = x[::2], labels[::2], x[1::2], labels[1::2]
    whole = measure((x, labels), (query, truth))
    assert 0.2 < whole.mean() < 1
    shares = [labels == 0, (labels > 0) & (np.arange(90) % 2 == 0), (labels > 0) & (np.arange(90) % 2 == 1)]
    shares.append(np.zeros(90, bool))
    sent = []

    def send(value):
        sent.append(value)
        return [value]

    for share in shares[:3]:
        measure((x[share], labels[share]), (query, truth), gather=send)
    with contextlib.suppress(ValueError, IndexError):  # alone it has nothing to find a class by
        measure((x[shares[3]], labels[shares[3]]), (query, truth), gather=send)
    assert len(sent) == 4
    for share in shares:
        found = measure((x[share], labels[share]), (query, truth), gather=lambda value: sent)
        assert np.array_equal(found, whole)
    most = 20 * len(query) if measure is metrics.knn_correct else 6 * (x.shape[1] + 1)
    assert all(np.asarray(part).size <= most for value in sent for part in value)


def test_retrieval_by_brute_force(generator):
    x, labels = generator.normal(size=(30, 4)), np.append(generator.integers(4, size=29), 9)  # 9 is alone
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = z @ z.T - 3 * np.eye(30)
    first, four, average = [], [], []
    for i in range(29):
        same = labels[np.argsort(-cosines[i])[:-1]] == labels[i]
        others = (labels == labels[i]).sum() - 1
        precision = np.cumsum(same[:others]) / np.arange(1, others + 1)
        first.append(same[0]), four.append(same[:4].any())
        average.append((precision * same[:others]).sum() / others)
    found = metrics.retrieval(x, labels)
    wanted = {"recall@1": np.mean(first), "recall@4": np.mean(four), "map@r": np.mean(average)}
    assert found == pytest.approx(wanted, abs=1e-6)


def test_hardest_pairs(generator, monkeypatch):
    x, labels = clusters(generator, classes=3, per_class=5)
    x[7], x[12] = x[1], x[4]  # two images of another class look like ones of the first
    for block in (1024, 4):
        monkeypatch.setattr(metrics, "_BLOCK", block)
        found = metrics.hardest_pairs(x, labels, 2)
        assert {pair[:2] for pair in found} == {(1, 7), (4, 12)}
        assert all(pair[2] == pytest.approx(1, abs=1e-5) for pair in found)
    assert metrics.hardest_pairs(x[:5], labels[:5], 2) == []
