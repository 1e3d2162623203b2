"""How sure a difference of two objectives is: paired by seed and by image, and corrected for the number of
comparisons."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t

from .results import RunRecord

SIGNIFICANT = 0.05  # a corrected p below it lets a report say "above" or "below"
ROUNDING = 1e-12  # equal differences of shares of 1 vary less than this: there is no error to estimate


@dataclass(frozen=True)
class Difference:
    """A mean difference of a figure between runs of the same seeds, as a share of 1.

    The interval is the 95 % interval of this comparison alone; ``corrected_p`` takes into account how many
    comparisons it is one of, and the verdict goes by it. With one seed there is neither.
    """

    objective: str
    reference: str
    figure: str
    by_seed: tuple[float, ...]
    half_width: float
    p: float  # of a difference this large if there were none
    images: int | None = None  # whose variation the interval holds too; None: that of the seeds alone
    corrected_p: float = math.nan

    @property
    def mean(self) -> float:
        return float(np.mean(self.by_seed))

    @property
    def verdict(self) -> str:
        if not self.corrected_p < SIGNIFICANT:
            return "not distinguishable from"
        return "above" if self.mean > 0 else "below"

    def row(self) -> dict[str, Any]:
        """A line of differences.csv."""
        row = {name: getattr(self, name) for name in ("objective", "reference", "figure")}
        low, high = self.mean - self.half_width, self.mean + self.half_width
        row |= {"difference": self.mean, "low": low, "high": high, "p": self.p, "holm_p": self.corrected_p}
        return row | {"seeds": len(self.by_seed), "images": self.images or ""}


def differences_of(
    runs: Mapping[str, Sequence[RunRecord]], untouched: Sequence[RunRecord], baseline: str
) -> list[Difference]:
    """All that a comparison asks, corrected together: the other objectives against ``baseline`` by top-1 and
    neighbours, and all of them against the untouched backbone by what frozen embeddings alone give."""
    asked = [
        (name, runs[baseline], figure) for figure in ("top1", "knn") for name in runs if name != baseline
    ]
    if untouched:
        asked += [(name, untouched, figure) for figure in ("centroid", "probe") for name in runs]
    return corrected([difference(runs[name], reference, figure) for name, reference, figure in asked])


def difference(records: Sequence[RunRecord], reference: Sequence[RunRecord], figure: str) -> Difference:
    """``figure`` of ``records`` less that of the runs of the same seeds in ``reference``.

    Where all runs judged the same images and kept for each of them whether it was right, the interval holds
    both variations, of seeds and of images; else that of the seeds alone.
    """
    partner = {record.seed: record for record in reference}
    pairs = [(record, partner[record.seed]) for record in records]
    by_seed = np.array([a.results[figure] - b.results[figure] for a, b in pairs])
    images, error = None, standard_error(by_seed[:, None])
    if all(_same_images(pairs[0][0], record, figure) for pair in pairs for record in pair):
        matrix = np.stack([a.correct[figure].astype(float) - b.correct[figure] for a, b in pairs])
        images, error = matrix.shape[1], standard_error(matrix)
    half_width = p = math.nan
    if error > ROUNDING:  # Student's t with the seeds' degrees of freedom
        half_width = float(t.ppf(0.975, len(pairs) - 1) * error)
        p = float(2 * t.sf(abs(by_seed.mean()) / error, len(pairs) - 1))
    names = records[0].objective, reference[0].objective, figure
    return Difference(*names, tuple(by_seed.tolist()), half_width, p, images)


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The same with Holm's p-values over all of them (Scand. J. Statist. 6, 1979): however many there are,
    the chance that any difference is called real where none is stays below the level."""
    p = holm([d.p for d in differences])
    return [dataclasses.replace(d, corrected_p=value) for d, value in zip(differences, p, strict=True)]


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values. One that is NaN, of a comparison that was not possible, stays so and does not
    count."""
    p = np.array(p, dtype=float)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN comes last
    p[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return p.tolist()


def standard_error(x: np.ndarray) -> float:
    """Of the mean of ``x`` [seeds, images], whose rows and columns are both random draws; NaN of one seed.

    The variance of the seeds' means over their number, as in Student's interval, plus the part of the images:
    what their means vary beyond chance, over their number (variance components of a two-way table; Searle,
    Casella & McCulloch, "Variance Components", 1992). A bootstrap that draws seeds and images anew estimates
    the same with one bias: it counts three times what neither seeds nor images explain (Owen, "The pigeonhole
    bootstrap", Ann. Appl. Statist. 1, 2007), and of answers that are right or wrong that is the most.

    It is at least what the rest alone gives: seeds whose means happen to agree do not show that chance is
    absent.
    """
    seeds, images = x.shape
    if seeds < 2:
        return math.nan
    of_seeds, of_images = x.mean(axis=1), x.mean(axis=0)
    variance = of_seeds.var(ddof=1) / seeds
    if images > 1:
        rest = ((x - of_seeds[:, None] - of_images + x.mean()) ** 2).sum() / ((seeds - 1) * (images - 1))
        variance += max(0.0, of_images.var(ddof=1) - rest / seeds) / images
        variance = max(variance, rest / (seeds * images))
    return math.sqrt(variance)


def _same_images(a: RunRecord, b: RunRecord, figure: str) -> bool:
    """Whether both kept for the same images whether they were right."""
    same_split = a.results.get("split") == b.results.get("split")
    is_kept = figure in a.correct and figure in b.correct
    return same_split and is_kept and np.array_equal(a.correct["images"], b.correct["images"])
