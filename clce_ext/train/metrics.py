"""How good a classifier and its embeddings are. Embeddings are numpy arrays [N, D], labels [N]."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score

from .errors import TrainingError, listing

_BLOCK = 1024  # rows of a similarity matrix at a time
Embedded = tuple[np.ndarray, np.ndarray]  # embeddings [N, D] of images and their labels [N]
Gather = Callable[[Any], list[Any]]  # every process's value; Processes.gather


def normalized(x: np.ndarray) -> np.ndarray:
    """Rows divided by their length: [N, D] float64."""
    x = np.asarray(x, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def knn_correct(
    train: Embedded, test: Embedded, gather: Gather = lambda value: [value], neighbours: int = 20
) -> np.ndarray:
    """Of which test images [N] a vote among the most similar training images finds the class: bool.

    As DINO's protocol has it (Caron et al., arXiv 2104.14294): 20 neighbours by cosine, each with a weight of
    exp(cosine / 0.07). Each of several processes gives some of the training images and all test images;
    ``gather`` brings only the nearest of its own to the others.
    """
    keys, queries = (F.normalize(torch.from_numpy(x).float()) for x, _ in (train, test))
    nearest = [(block @ keys.T).topk(min(neighbours, len(keys))) for block in queries.split(_BLOCK)]
    own = [(cosines, torch.from_numpy(train[1])[places]) for cosines, places in nearest]
    shares = gather([torch.cat(of) for of in zip(*own, strict=True)])
    cosines, labels = (torch.cat(of, dim=1) for of in zip(*shares, strict=True))
    cosines, places = cosines.topk(min(neighbours, cosines.shape[1]))
    labels = labels.gather(1, places)  # [N, neighbours]
    same = labels[:, :, None] == labels[:, None, :]
    votes = (same * (cosines / 0.07).exp()[:, None, :]).sum(dim=2)  # for each neighbour's class
    return labels.gather(1, votes.argmax(dim=1, keepdim=True))[:, 0].numpy() == test[1]


def centroid_correct(train: Embedded, test: Embedded, gather: Gather = lambda value: [value]) -> np.ndarray:
    """Of which test images [N] the nearest class mean, embeddings normalised, is their own: bool. Of several
    processes ``gather`` brings the sums of each one's own training images to the others."""
    x, labels = train
    shares = gather(_class_sums(labels, np.column_stack([normalized(x), np.ones(len(x))])))
    classes, sums = _class_sums(*(np.concatenate(of) for of in zip(*shares, strict=True)))
    means = sums[:, :-1] / sums[:, -1:]
    distances = (means**2).sum(axis=1) - 2 * normalized(test[0]) @ means.T  # squared, but for what all have
    return classes[distances.argmin(axis=1)] == test[1]


def _class_sums(labels: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(classes that occur [C], sums of their rows [C, D])"""
    classes, places = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(classes), rows.shape[1]))
    np.add.at(sums, places, rows)
    return classes, sums


def probe_correct(train: Embedded, test: Embedded) -> np.ndarray:
    """Of which test images [N] logistic regression on frozen embeddings, normalised (a linear probe), finds
    the class: bool."""
    (x, labels), (queries, truth) = train, test
    if len(np.unique(labels)) < 2:
        return truth == labels[0]
    # Normalised embeddings are short: scikit-learn's default of C = 1 would hold the weights too small.
    probe = _logistic_regression(normalized(x), labels, C=10, max_iter=1000)
    return probe.predict(normalized(queries)) == truth


def _logistic_regression(x: np.ndarray, labels: np.ndarray, **options: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one that has not quite converged still classifies
        return LogisticRegression(**options).fit(x, labels)


def _cosines(x: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of rows [n] and their cosines with all rows [n, N]."""
    x = normalized(x)
    for rows in np.split(np.arange(len(x)), range(_BLOCK, len(x), _BLOCK)):
        yield rows, x[rows] @ x.T


def quality(x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Silhouette, alignment, uniformity, isotropy, Recall@K and MAP@R of the embeddings."""
    figures = {"silhouette": silhouette(x, labels), "alignment": alignment(x, labels)}
    return figures | {"uniformity": uniformity(x), "isotropy": isotropy(x), **retrieval(x, labels)}


def alignment(x: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of two normalised embeddings of one class (Wang & Isola, arXiv 2005.10242); 0
    is best. NaN where no class has two images."""
    x = normalized(x)
    squares = (x**2).sum(axis=1)  # 1, but an embedding may be 0
    sums = _class_sums(labels, np.column_stack([x, squares, np.ones(len(x))]))[1]
    sums, squares, count = sums[:, :-2], sums[:, -2], sums[:, -1]
    pairs = (count * (count - 1)).sum()
    # The sum over ordered pairs of |a - b|^2 is 2 n sum |a|^2 - 2 |sum a|^2.
    total = 2 * (count * squares - (sums**2).sum(axis=1)).sum()
    return float(total / pairs) if pairs else math.nan


def uniformity(x: np.ndarray, t: float = 2.0) -> float:
    """log of the mean of exp(-t |a - b|^2) over pairs of normalised embeddings (Wang & Isola); lower is
    more even."""
    n = len(x)
    if n < 2:
        return math.nan
    total = sum(np.exp(2 * t * np.minimum(cosines - 1, 0)).sum() for _, cosines in _cosines(x))
    return float(np.log((total - n) / (n * (n - 1))))


def isotropy(x: np.ndarray) -> float:
    """min Z(c) / max Z(c) of the partition function Z(c) = sum_i exp(c . x_i) over the eigenvectors c of
    x'x and their opposites (Mu & Viswanath, arXiv 1702.01417), x normalised; 1 is isotropic."""
    x = normalized(x)
    projections = x @ np.linalg.eigh(x.T @ x)[1]  # on eigenvectors, in columns
    z = np.exp(np.hstack([projections, -projections])).sum(axis=0)
    return float(z.min() / z.max())


def silhouette(x: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette by cosine distance, in [-1, 1]; NaN unless 2 <= classes < images."""
    if not 2 <= len(np.unique(labels)) < len(labels):
        return math.nan
    return float(silhouette_score(np.asarray(x, dtype=np.float64), labels, metric="cosine"))


def pair_cosines(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all pairs of images of one class, and of all pairs of two classes."""
    x = normalized(x)
    i, j = np.triu_indices(len(x), 1)
    cosines, same = (x @ x.T)[i, j].clip(-1, 1), labels[i] == labels[j]
    return cosines[same], cosines[~same]


def retrieval(x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Recall@K, how often one of the K nearest other images is of the same class, and MAP@R (Musgrave et al.,
    arXiv 2003.08505), by pytorch-metric-learning. An image whose class has no other counts in neither."""
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
    names = {"precision_at_1": "recall@1", "recall_at_4": "recall@4", "mean_average_precision_at_r": "map@r"}
    return {name: figures[theirs] for theirs, name in names.items()}


def hardest_pairs(x: np.ndarray, labels: np.ndarray, count: int) -> list[tuple[int, int, float]]:
    """(i, j, cosine) of the images of different classes that are most alike, i < j; no image in two pairs."""
    candidates: list[tuple[float, int, int]] = []
    for rows, cosines in _cosines(x):
        cosines[labels[rows, None] == labels] = -2
        nearest = cosines.argmax(axis=1)
        candidates += zip(cosines.max(axis=1).tolist(), rows.tolist(), nearest.tolist(), strict=True)
    pairs, used = [], set()
    for cosine, i, j in sorted(candidates, reverse=True):
        if len(pairs) < count and cosine > -2 and not used & {i, j}:
            pairs.append((min(i, j), max(i, j), cosine))
            used |= {i, j}
    return pairs


class Interval(NamedTuple):
    """A mean and half the width of its 95 % confidence interval."""

    mean: float
    half_width: float
    count: int

    def text(self, scale: float = 100.0, digits: int = 1) -> str:
        """Mean and half width, by default in percent: ``91.2 ± 0.3``."""
        if not math.isfinite(self.mean):
            return "n/a"
        half = f" ± {scale * self.half_width:.{digits}f}" if math.isfinite(self.half_width) else ""
        return f"{scale * self.mean:.{digits}f}{half}"


def confidence_interval(values: np.ndarray) -> Interval:
    """Student's t interval of the mean; the half width of a single value is NaN."""
    from scipy.stats import t

    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else math.nan
    return Interval(float(values.mean()), half, n)


def episode_classes(
    labels: np.ndarray, ways: int, shots: int, queries: int, names: Sequence[str]
) -> tuple[np.ndarray, list[str]]:
    """The classes that are large enough for episodes of up to ``shots`` images to fit a head, and those that
    are not, in words. ``names`` are those of the classes.

    Raises:
        TrainingError: fewer classes, or images per class, than an episode needs.
    """
    classes, counts = np.unique(labels, return_counts=True)
    is_large = counts >= shots + queries
    small = [f"{names[c]} ({n})" for c, n in zip(classes[~is_large], counts[~is_large], strict=True)]
    if is_large.sum() < ways or ways < 2:
        remedy = ". Fewer --queries, --shots or --ways need less"
        raise TrainingError(
            f"few-shot episodes of {ways} ways, {shots} shots and {queries} queries need at least "
            f"{max(ways, 2)} classes of {shots + queries} images; {is_large.sum()} of {len(classes)} classes "
            f"are large enough{f', too small are {listing(small)}{remedy}' if small else ''}"
        )
    return classes[is_large], small


def few_shot_episodes(
    images: Embedded, classes: np.ndarray, ways: int, shots: int, queries: int, episodes: int, seed: int = 0
) -> dict[str, Interval]:
    """N-way K-shot classification of frozen embeddings, normalised, by the nearest class mean (``centroid``)
    and by logistic regression (``logistic``). Every episode draws ``ways`` of ``classes`` (episode_classes),
    and of each ``shots`` images to fit a head and ``queries`` others to classify."""
    x, labels = normalized(images[0]), images[1]
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
