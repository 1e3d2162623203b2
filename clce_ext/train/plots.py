"""Figures as SVG text: small, sharp at any size, drawn for a phone's width."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

from .objectives import OBJECTIVES, UNTOUCHED

_STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
    "svg.hashsalt": "clce_ext",  # the same bytes every time
    "savefig.transparent": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ab",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#5b6770",
    "ytick.color": "#5b6770",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e9ec",
}


def color(objective: str) -> str:
    return "#a8935f" if objective == UNTOUCHED else OBJECTIVES[objective].color


def learning_curves(curves: Mapping[str, Sequence[np.ndarray]], title: str, unit: str = "%") -> Markup:
    """Per objective and seed a value for each epoch, or NaN; thin lines are seeds, a thick one their mean,
    which is a dot where it is of one epoch."""
    axes, means = _axes(title), {}
    for name, runs in curves.items():
        shared = min(map(len, runs))
        mean = np.mean([values[:shared] for values in runs], axis=0)
        for values, alpha, width in [*((values, 0.25, 0.8) for values in runs), (mean, 1, 2)]:
            epochs = np.flatnonzero(np.isfinite(values))
            style = {"color": color(name), "alpha": alpha, "linewidth": width}
            marker = "o" if len(epochs) == 1 else None
            (means[name],) = axes.plot(epochs + 1, values[epochs], marker=marker, **style)
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    return _svg(axes, means)


def differences(rows: Sequence[tuple[str, Sequence[float], float, float]], title: str) -> Markup:
    """(objective, differences by seed [S], mean, half width) in percentage points, one below the other."""
    axes = _axes(title, 0.9 + 0.55 * len(rows), **{"axes.grid.axis": "x"})
    axes.axvline(0, color="#9aa3ab", linewidth=1)
    for y, (name, values, mean, half) in enumerate(rows):
        axes.plot(values, [y] * len(values), "o", color=color(name), alpha=0.35, ms=5, mew=0)
        axes.errorbar(mean, y, xerr=half, fmt="o", color=color(name), ms=9, mec="white", elinewidth=2.5)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("percentage points")
    return _svg(axes)


def sweep_curves(
    points: Mapping[str, Sequence[tuple[int, float, float]]], values: Sequence[Any], title: str
) -> Markup:
    """Per objective (place in ``values``, mean, half width) of every setting that has one of these values of
    an option, in percent: dots for all, a line through the best of each value."""
    axes, shown = _axes(title), {}
    for name, of in points.items():
        best = sorted({place: (place, mean, half) for place, mean, half in sorted(of)}.values())
        shown[name] = axes.errorbar(*zip(*best, strict=True), color=color(name), marker="o", ms=6, capsize=3)
        places, means, _ = zip(*of, strict=True)
        axes.plot(places, means, "o", color=color(name), alpha=0.3, ms=5, mew=0)
    axes.set_xticks(range(len(values)), list(map(str, values)))
    axes.set_ylabel("%")
    return _svg(axes, shown)


def embedding_map(points: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str) -> Markup:
    """points [N, 2] in the colours of their classes, which up to twelve are named below."""
    axes, shown = _axes(title, 4.0, 4.0, **{"axes.grid": False}), {}
    palette = matplotlib.colormaps["tab10" if len(classes) <= 10 else "turbo"]
    for label in np.unique(labels):
        tint = palette(int(label) if len(classes) <= 10 else label / (len(classes) - 1))
        axes.plot(*points[labels == label].T, "o", color=tint, alpha=0.75, ms=3, mew=0)
        (shown[classes[label]],) = axes.plot([], [], "o", color=tint, alpha=0.75)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return _svg(axes, shown if len(classes) <= 12 else {}, f"map of the embeddings: {title}")


def cosine_histogram(within: np.ndarray, between: np.ndarray, name: str, low: float) -> Markup:
    """Densities of the cosines within and between classes, from ``low`` to 1."""
    axes, shown = _axes(name, 2.6, 4.0, **{"axes.grid": False}), {}
    kinds = {"two classes": (between, "#c3cad0", 0.9), "one class": (within, color(name), 0.6)}
    for label, (cosines, tint, alpha) in kinds.items():
        if len(cosines):
            style = {"histtype": "stepfilled", "color": tint, "alpha": alpha}
            shown[label] = axes.hist(cosines, np.linspace(low, 1, 60), density=True, **style)[2][0]
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(low, 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("cosine of two images of …")
    return _svg(axes, shown, f"cosines within and between classes: {name}")


def confusion(counts: np.ndarray, classes: Sequence[str]) -> Markup:
    """counts [C, C]: how often images of one class (row) are taken for another (column)."""
    axes = _axes("What they are taken for", 4.4, 4.4, **{"axes.grid": False})
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    style = {"ha": "center", "va": "center", "fontsize": min(9, 120 / len(counts))}
    for (row, column), count in np.ndenumerate(counts):
        ink = "white" if shares[row, column] > 0.5 else "#1d2429"
        axes.text(column, row, count or "", color=ink, **style)
    axes.set_xticks(range(len(classes)), classes, rotation=90, parse_math=False)
    axes.set_yticks(range(len(classes)), classes, parse_math=False)
    axes.set_xlabel("taken for")
    return _svg(axes, description="confusion matrix")


def photograph(image: Image.Image, side: int = 128) -> str:
    """A thumbnail as a data address; images of few pixels are enlarged with their pixels visible."""
    method = Image.Resampling.NEAREST if 2 * max(image.size) < side else Image.Resampling.BICUBIC
    out = io.BytesIO()
    ImageOps.contain(image.convert("RGB"), (side, side), method).save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _axes(title: str, height: float = 3.3, width: float = 4.4, **style: Any) -> Axes:
    """Of a figure of that many inches."""
    with matplotlib.rc_context(_STYLE | style):
        axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
        axes.set_title(title)
        return axes


def _svg(axes: Axes, legend: Mapping[str, Artist] | None = None, description: str = "") -> Markup:
    """What was drawn, with the names of ``legend`` below it where there are several."""
    if legend and len(legend) > 1:
        columns = min(len(legend), 6, max(1, 56 // (7 + max(map(len, legend)))))
        style = {"ncols": columns, "frameon": False, "fontsize": 9}
        names = ["-"] * len(legend)
        below = axes.figure.legend(list(legend.values()), names, loc="outside lower center", **style)
        for text, name in zip(below.get_texts(), legend, strict=True):  # a class's name is no formula
            text.set(text=name, parse_math=False)
    out = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Text stays text, and a browser has the characters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        axes.figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    _, tag, drawn = out.getvalue().partition("<svg")
    label = description or axes.get_title(loc="left")
    return Markup('{} role="img" aria-label="{}"{}').format(Markup(tag), label, Markup(drawn))
