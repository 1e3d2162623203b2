"""Figures as SVG text: small, sharp at any size, drawn for a phone's width."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .metrics import Interval
from .objectives import OBJECTIVES, UNTOUCHED

_STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
    "svg.hashsalt": "clce_ext",  # the same bytes every time
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ab",
    "axes.labelcolor": "#3d464d",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#5b6770",
    "ytick.color": "#5b6770",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e9ec",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.transparent": True,
}
_RASTER_FROM = 3000  # points; more would make the page heavy


def color(objective: str) -> str:
    return "#a8935f" if objective == UNTOUCHED else OBJECTIVES[objective].color


def learning_curves(
    curves: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], title: str, unit: str = "%"
) -> str:
    """Per objective and seed (epochs [E], values [E]): thin lines per seed, thick mean, name at its end."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(4.4, 3.1), layout="constrained")
        ends = {}
        for name, runs in curves.items():
            for epochs, values in runs:
                axes.plot(epochs, values, color=color(name), alpha=0.25, linewidth=0.8)
            shared = min(len(values) for _, values in runs)
            mean = np.mean([values[:shared] for _, values in runs], axis=0)
            axes.plot(runs[0][0][:shared], mean, color=color(name), linewidth=2, solid_capstyle="round")
            ends[name] = (runs[0][0][shared - 1], mean[-1])
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.set_ylabel(unit)
        _label_ends(axes, ends)
        return _svg(figure, title)


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Names right of the last points, pushed apart so that they do not overlap."""
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    names = sorted(ends, key=lambda n: ends[n][1])
    heights: list[float] = []
    for name in names:
        heights.append(max(ends[name][1], heights[-1] + gap) if heights else ends[name][1])
    overflow = max(0.0, heights[-1] - high) if heights else 0.0
    for i in reversed(range(len(heights))):  # what was pushed over the top moves down again
        heights[i] -= overflow
        if i and heights[i] - heights[i - 1] >= gap + overflow:
            break
    for name, height in zip(names, heights, strict=True):
        axes.annotate(
            name,
            (ends[name][0], height),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color(name),
            fontweight="bold",
            annotation_clip=False,
        )


def differences(rows: Sequence[tuple[str, np.ndarray, float, float]], title: str) -> str:
    """(objective, per-seed differences [S], mean, half width) in percentage points."""
    with plt.rc_context(_STYLE | {"axes.grid.axis": "x"}):
        figure, axes = plt.subplots(figsize=(4.4, 0.9 + 0.55 * len(rows)), layout="constrained")
        axes.axvline(0, color="#9aa3ab", linewidth=1)
        for y, (name, values, mean, half) in enumerate(reversed(rows)):
            axes.plot(
                values, np.full(len(values), y), "o", color=color(name), alpha=0.35, markersize=5, mew=0
            )
            if np.isfinite(half):
                axes.plot([mean - half, mean + half], [y, y], color=color(name), linewidth=2.5, alpha=0.8)
            axes.plot([mean], [y], "o", color=color(name), markersize=9, mec="white", mew=1.5)
        axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_title(title)
        axes.set_xlabel("percentage points")
        return _svg(figure, title)


def sweep_curves(lines: Mapping[str, Sequence[tuple[object, Sequence[Interval]]]], title: str) -> str:
    """Per objective, values of an option with the intervals of all settings that have it, as shares of 1."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(4.4, 3.1), layout="constrained")
        ticks = list(dict.fromkeys(value for points in lines.values() for value, _ in points))
        ends = {}
        for name, points in lines.items():
            if not points:
                continue
            best = [max(intervals, key=lambda interval: interval.mean) for _, intervals in points]
            x = [ticks.index(value) for value, _ in points]
            y = [100 * interval.mean for interval in best]
            half = np.nan_to_num([100 * interval.half_width for interval in best])
            axes.errorbar(x, y, half, color=color(name), linewidth=2, marker="o", markersize=6, capsize=3)
            for place, (_, intervals) in zip(x, points, strict=True):
                means = [100 * interval.mean for interval in intervals]
                axes.plot([place] * len(means), means, "o", color=color(name), alpha=0.3, markersize=5, mew=0)
            ends[name] = (x[-1], y[-1])
        axes.set_title(title)
        axes.set_xticks(range(len(ticks)), [str(value) for value in ticks])
        axes.set_ylabel("%")
        _label_ends(axes, ends)
        return _svg(figure, title)


def bars(values: Mapping[str, tuple[float, float]], title: str, unit: str) -> str:
    """Per objective (mean, half width)."""
    with plt.rc_context(_STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(figsize=(4.4, 0.7 + 0.45 * len(values)), layout="constrained")
        names = list(reversed(values))
        means = [values[n][0] for n in names]
        axes.barh(names, means, color=[color(n) for n in names], height=0.6)
        for y, name in enumerate(names):
            axes.annotate(
                f"{values[name][0]:.3g} {unit}",
                (values[name][0], y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_xlim(0, max(means) * 1.25 if max(means) > 0 else 1)
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_title(title)
        return _svg(figure, title)


def embedding_map(points: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str) -> str:
    """points [N, 2] in the colours of their classes; with up to twelve classes the name stands at the median,
    or beside it where another name is in the way."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(4.0, 4.0), layout="constrained")
        palette = matplotlib.colormaps["tab10" if len(classes) <= 10 else "turbo"]
        names = []
        for label in np.unique(labels):
            tint = palette(int(label)) if len(classes) <= 10 else palette(label / max(len(classes) - 1, 1))
            members = points[labels == label]
            axes.scatter(
                *members.T, s=9, color=tint, alpha=0.75, linewidths=0, rasterized=len(points) > _RASTER_FROM
            )
            if len(classes) <= 12:
                box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": tint, "alpha": 0.85}
                style = {"ha": "center", "va": "center", "fontweight": "bold", "fontsize": 11}
                place = np.median(members, axis=0)
                names.append(
                    axes.text(*place, classes[label], color="#1d2429", bbox=box, parse_math=False, **style)
                )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_title(title)
        _push_apart(figure, axes, names)
        return _svg(figure, f"map of the embeddings: {title}")


def _push_apart(figure: Figure, axes: Axes, names: Sequence[Text], gap: float = 6.0) -> None:
    """Moves names, in pixels, until no two boxes overlap, the shorter way, and back into the axes."""
    figure.canvas.draw()
    inside = axes.get_window_extent()
    boxes = [name.get_bbox_patch().get_window_extent() for name in names]
    half = np.array([[box.width, box.height] for box in boxes]).reshape(-1, 2) / 2 + gap / 2
    centre = np.array([[box.x0 + box.x1, box.y0 + box.y1] for box in boxes]).reshape(-1, 2) / 2
    # Boxes wider than the axes stay where they are.
    low = np.minimum(np.array([inside.x0, inside.y0]) + half, [inside.x1, inside.y1] - half)
    high = np.maximum(np.array([inside.x0, inside.y0]) + half, [inside.x1, inside.y1] - half)
    for _ in range(200):
        moved = False
        for i in range(len(boxes)):
            for j in range(i):
                overlap = half[i] + half[j] - abs(centre[i] - centre[j])
                if (overlap > 0).all():
                    way = int(overlap.argmin())
                    step = overlap[way] / 2 * (1 if centre[i][way] >= centre[j][way] else -1)
                    centre[i][way] += step
                    centre[j][way] -= step
                    moved = True
        centre = np.clip(centre, low, high)
        if not moved:
            break
    for name, place in zip(names, centre, strict=True):
        name.set_position(axes.transData.inverted().transform(place))


def cosine_histogram(histogram: Mapping[str, np.ndarray], name: str, title: str, low: float = -1.0) -> str:
    """Densities of the cosines within and between classes, from ``low`` to 1."""
    with plt.rc_context(_STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(figsize=(4.0, 2.6), layout="constrained")
        edges = histogram["edges"]
        axes.stairs(histogram["between"], edges, fill=True, color="#c3cad0", alpha=0.9, label="two classes")
        axes.stairs(histogram["within"], edges, fill=True, color=color(name), alpha=0.6, label="one class")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlim(low, 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel("cosine of two images of …")
        figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=9)
        axes.set_title(title)
        return _svg(figure, f"cosines within and between classes: {title}")


def photograph(image: Image.Image, side: int = 128) -> str:
    """A thumbnail as a data address; images of few pixels are enlarged with their pixels visible."""
    image = image.convert("RGB")
    factor = side / max(image.size)
    size = tuple(max(1, round(length * factor)) for length in image.size)
    image = image.resize(size, Image.Resampling.NEAREST if factor > 2 else Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _svg(figure: Figure, description: str) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]  # without the XML prologue, for inlining
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)  # CSS decides the size
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
