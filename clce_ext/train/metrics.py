"""How good a classifier and its embeddings are. Embeddings are numpy arrays [N, D], labels [N]."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestCentroid

from .errors import TrainingError, listing

_BLOCK = 1024  # rows of a similarity matrix at a time


def normalized(x: np.ndarray) -> np.ndarray:
    """Rows divided by their length: [N, D] float64."""
    x = np.asarray(x, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def knn_correct(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Of which images [N] a vote among the ``neighbours`` most similar training images finds the class: bool.

    As DINO's protocol has it (Caron et al., arXiv 2104.14294): 20 neighbours by cosine, each with a weight of
    exp(cosine / 0.07).
    """
    x, y = normalized(train).astype(np.float32), normalized(test).astype(np.float32)
    count, classes = min(neighbours, len(x)), int(train_labels.max()) + 1
    found = np.empty(len(y), dtype=np.int64)
    for begin in range(0, len(y), _BLOCK):
        cosines = y[begin : begin + _BLOCK] @ x.T
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        weights = np.exp(np.take_along_axis(cosines, nearest, axis=1) / temperature)
        votes = np.zeros((len(cosines), classes))
        np.add.at(votes, (np.arange(len(cosines))[:, None], train_labels[nearest]), weights)
        found[begin : begin + _BLOCK] = votes.argmax(axis=1)
    return found == test_labels


def centroid_correct(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> np.ndarray:
    """Of which images [N] the nearest class mean, embeddings normalised, is their own: bool."""
    if len(np.unique(train_labels)) < 2:
        return test_labels == train_labels[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of features that are zero everywhere, as behind a ReLU
        classifier = NearestCentroid().fit(normalized(train), train_labels)
    return classifier.predict(normalized(test)) == test_labels


def probe_correct(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> np.ndarray:
    """Of which images [N] logistic regression on frozen embeddings, normalised (a linear probe), finds the
    class: bool."""
    if len(np.unique(train_labels)) < 2:
        return test_labels == train_labels[0]
    # Normalised embeddings are short: scikit-learn's default of C = 1 would hold the weights too small.
    probe = _logistic_regression(normalized(train), train_labels, C=10, max_iter=1000)
    return probe.predict(normalized(test)) == test_labels


def _logistic_regression(x: np.ndarray, labels: np.ndarray, **options: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one that has not quite converged still classifies
        return LogisticRegression(**options).fit(x, labels)


def alignment(x: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of two normalised embeddings of one class (Wang & Isola, arXiv 2005.10242); 0
    is best.

    NaN where no class has two images.
    """
    x = normalized(x)
    total, pairs = 0.0, 0
    for label in np.unique(labels):
        members = x[labels == label]
        n = len(members)
        # sum over ordered pairs of |a - b|^2 = 2 n sum |a|^2 - 2 |sum a|^2
        total += 2 * n * (members**2).sum() - 2 * (members.sum(axis=0) ** 2).sum()
        pairs += n * (n - 1)
    return float(total / pairs) if pairs else float("nan")


def uniformity(x: np.ndarray, t: float = 2.0) -> float:
    """log of the mean of exp(-t |a - b|^2) over pairs of normalised embeddings (Wang & Isola); lower is
    more even."""
    x = normalized(x)
    n = len(x)
    if n < 2:
        return float("nan")
    total = 0.0
    for begin in range(0, n, _BLOCK):
        squared = np.clip(2 - 2 * x[begin : begin + _BLOCK] @ x.T, 0, None)
        total += np.exp(-t * squared).sum()
    return float(np.log((total - n) / (n * (n - 1))))


def isotropy(x: np.ndarray) -> float:
    """min Z(c) / max Z(c) of the partition function Z(c) = sum_i exp(c . x_i) over the eigenvectors c of
    x'x and their opposites (Mu & Viswanath, arXiv 1702.01417), x normalised; 1 is isotropic."""
    x = normalized(x)
    directions = np.linalg.eigh(x.T @ x)[1]  # [D, D], eigenvectors in columns
    projections = x @ directions
    z = np.concatenate([np.exp(projections).sum(axis=0), np.exp(-projections).sum(axis=0)])
    return float(z.min() / z.max())


def silhouette(x: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette by cosine distance, in [-1, 1]; NaN unless 2 <= classes < images."""
    if not 2 <= len(np.unique(labels)) < len(labels):
        return float("nan")
    return float(silhouette_score(np.asarray(x, dtype=np.float64), labels, metric="cosine"))


def cosine_histograms(x: np.ndarray, labels: np.ndarray, bins: int = 60) -> dict[str, np.ndarray]:
    """Densities of the cosines of pairs of one class and of two classes: edges [bins + 1], within,
    between."""
    x = normalized(x)
    edges = np.linspace(-1, 1, bins + 1)
    counts = {True: np.zeros(bins), False: np.zeros(bins)}
    for begin in range(0, len(x), _BLOCK):
        rows = np.arange(begin, min(begin + _BLOCK, len(x)))
        cosines = np.clip(x[rows] @ x.T, -1, 1)
        same = labels[rows, None] == labels[None, :]
        later = rows[:, None] < np.arange(len(x))[None, :]  # every pair once, no image with itself
        for kind in (True, False):
            counts[kind] += np.histogram(cosines[later & (same == kind)], bins=edges)[0]
    width = edges[1] - edges[0]
    within, between = (counts[kind] / max(counts[kind].sum() * width, 1e-12) for kind in (True, False))
    return {"edges": edges, "within": within, "between": between}


def retrieval(x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Recall@K, how often one of the K nearest other images is of the same class, and MAP@R (Musgrave et al.,
    arXiv 2003.08505), by pytorch-metric-learning. An image whose class has no other counts in neither."""
    import torch
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    class Calculator(AccuracyCalculator):
        def requires_knn(self) -> list[str]:
            return [*super().requires_knn(), "recall_at_4"]

        def calculate_recall_at_4(self, knn_labels, query_labels, not_lone_query_mask, **_) -> float:
            found = (knn_labels[:, :4] == query_labels[:, None]).any(dim=1)[not_lone_query_mask]
            return float(found.double().mean())

    figures = Calculator(
        include=("precision_at_1", "recall_at_4", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(CosineSimilarity(), batch_size=_BLOCK),  # the default needs faiss
        device=torch.device("cpu"),
    ).get_accuracy(torch.from_numpy(np.asarray(x, dtype=np.float32)), torch.from_numpy(labels))
    names = {"recall@1": "precision_at_1", "recall@4": "recall_at_4", "map@r": "mean_average_precision_at_r"}
    return {name: figures[theirs] for name, theirs in names.items()}


def hardest_pairs(x: np.ndarray, labels: np.ndarray, count: int) -> list[tuple[int, int, float]]:
    """(i, j, cosine) of the images of different classes that are most alike, i < j; no image in two pairs."""
    x = normalized(x).astype(np.float32)
    candidates: list[tuple[float, int, int]] = []
    for begin in range(0, len(x), _BLOCK):
        rows = np.arange(begin, min(begin + _BLOCK, len(x)))
        cosines = x[rows] @ x.T
        cosines[labels[rows, None] == labels[None, :]] = -2
        nearest = cosines.argmax(axis=1)
        best = cosines[np.arange(len(rows)), nearest]
        candidates += [
            (float(c), int(i), int(j)) for c, i, j in zip(best, rows, nearest, strict=True) if c > -2
        ]
    pairs, used = [], set()
    for cosine, i, j in sorted(candidates, reverse=True):
        if len(pairs) < count and not used & {i, j}:
            pairs.append((min(i, j), max(i, j), cosine))
            used |= {i, j}
    return pairs


def embedding_quality(x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "silhouette": silhouette(x, labels),
        "alignment": alignment(x, labels),
        "uniformity": uniformity(x),
        "isotropy": isotropy(x),
        **retrieval(x, labels),
    }


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % confidence interval."""

    mean: float
    half_width: float
    count: int


def confidence_interval(values: np.ndarray) -> Interval:
    """Student's t interval of the mean; the half width of a single value is NaN."""
    from scipy.stats import t

    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return Interval(float(values.mean()), half, n)


def episode_classes(
    labels: np.ndarray, ways: int, shots: int, queries: int, names: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """The classes that are large enough for episodes of up to ``shots`` images to fit a head, and those that
    are not, in words. ``names`` are those of the classes.

    Raises:
        TrainingError: fewer classes, or images per class, than an episode needs.
    """
    counts = dict(zip(*np.unique(labels, return_counts=True), strict=True))
    large = np.array([c for c, count in counts.items() if count >= shots + queries], dtype=np.int64)
    small = [f"{names[c] if names else c} ({count})" for c, count in counts.items() if c not in large]
    if len(large) < ways or ways < 2:
        raise TrainingError(
            f"few-shot episodes of {ways} ways, {shots} shots and {queries} queries need at least "
            f"{max(ways, 2)} classes of {shots + queries} images; "
            f"{len(large)} of {len(counts)} classes are large enough"
            + (
                f", too small are {listing(small)}. Fewer --queries, --shots or --ways need less"
                if small
                else ""
            )
        )
    return large, small


def few_shot_episodes(
    x: np.ndarray,
    labels: np.ndarray,
    classes: np.ndarray,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    seed: int = 0,
) -> dict[str, Interval]:
    """N-way K-shot classification of frozen embeddings, normalised.

    Every episode draws ``ways`` of ``classes`` (episode_classes), and of each ``shots`` images to fit a head
    and ``queries`` others to classify. Heads: ``centroid`` (nearest class mean) and ``logistic`` (logistic
    regression).
    """
    x = normalized(x)
    members = {c: np.flatnonzero(labels == c) for c in classes}
    generator = np.random.default_rng(seed)
    accuracy: dict[str, list[float]] = {"centroid": [], "logistic": []}
    support_labels, query_labels = np.repeat(np.arange(ways), shots), np.repeat(np.arange(ways), queries)
    for _ in range(episodes):
        drawn = generator.choice(classes, ways, replace=False)
        rows = np.stack([generator.choice(members[c], shots + queries, replace=False) for c in drawn])
        support = x[rows[:, :shots].ravel()]  # [ways * shots, D]
        query = x[rows[:, shots:].ravel()]  # [ways * queries, D]
        means = normalized(support.reshape(ways, shots, -1).mean(axis=1))
        accuracy["centroid"].append(np.mean((query @ means.T).argmax(axis=1) == query_labels))
        head = _logistic_regression(support, support_labels, max_iter=200)
        accuracy["logistic"].append(np.mean(head.predict(query) == query_labels))
    return {name: confidence_interval(np.array(values)) for name, values in accuracy.items()}
