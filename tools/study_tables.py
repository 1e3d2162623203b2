"""Tables and plots of docs/study.md, from the runs that tools/study.py has finished."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from clce_ext.train.intervals import Difference, corrected, difference
from clce_ext.train.metrics import confidence_interval
from clce_ext.train.objectives import UNTOUCHED
from clce_ext.train.plots import color
from clce_ext.train.results import RunRecord, read_run, untouched_records

RUNS, DEMO = Path("runs/study"), Path("runs/demo")
FIGURES = {"top1": "top-1", "knn": "neighbours", "centroid": "class means", "probe": "logistic regression"}
_FROZEN = ["knn", "centroid", "probe"]  # what a backbone without a classifier has
OBJECTIVES = ("ce", "supcon", "lacvit", "schane", "clce")
EPISODE_OBJECTIVES = ("ce", "supcon", "schane", "clce")
SHOTS, PHOTO_SHOTS = (1, 2, 5, 10, 20, 50), (1, 5, 10, 20, 50)
BATCHES = (10, 20, 50, 100, 200)
# Values of the loss's options beside the defaults.
OPTIONS = {"weight": (0.5, 0.99), "temperature": (0.1, 0.25, 1.0), "beta": (0.0, 0.5, 2.0)}
DEFAULTS = {"weight": 0.9, "temperature": 0.5, "beta": 1.0}
SYMBOLS = {"weight": "λ", "temperature": "τ", "beta": "β"}


def records(name: str, objective: str, folder: Path | None = None) -> list[RunRecord]:
    """The finished runs of an objective in a part, on the test split."""
    runs = (folder or RUNS / name) / "runs"
    found = [p for p in runs.glob(f"{objective}-seed*") if (p / "results-test.json").exists()]
    return sorted((read_run(p, "test") for p in found), key=lambda r: r.seed)


def figure(values: Iterable[float]) -> str:
    """Percent: mean ± half of the 95 % interval; of two values, whose interval would say nothing, both."""
    values = np.array(list(values))
    interval = confidence_interval(values)
    if len(values) == 2:
        return f"{100 * interval.mean:.1f} ({', '.join(f'{100 * v:.1f}' for v in values)})"
    half = "" if np.isnan(interval.half_width) else f" ± {100 * interval.half_width:.1f}"
    return f"{100 * interval.mean:.1f}{half}"


def signed(d: Difference) -> str:
    """Points, with an asterisk where the corrected p is small."""
    half = "" if np.isnan(d.half_width) else f" ± {100 * d.half_width:.1f}"
    return f"{100 * d.mean:+.1f}{half}{'' if d.verdict.startswith('not') else ' *'}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def accuracy_table(runs: Mapping[str, list[RunRecord]]) -> str:
    """Objectives and the untouched backbone by figure; under it what lies between them."""
    untouched = untouched_records(runs["ce"])
    rows = []
    if untouched:
        rows.append(["untouched backbone", "–", *(figure(r.results[f] for r in untouched) for f in _FROZEN)])
    rows += [[f"`{name}`", *(figure(r.results[f] for r in of) for f in FIGURES)] for name, of in runs.items()]
    pairs = [(name, "ce", runs["ce"], list(FIGURES)) for name in runs if name != "ce"]
    pairs += [(name, UNTOUCHED, untouched, _FROZEN) for name in runs if untouched]
    found = [
        (name, reference, difference(runs[name], of, f))
        for name, reference, of, figures in pairs
        for f in figures
    ]
    p = corrected([d for *_, d in found])
    shown = {(name, reference, d.figure): d for (name, reference, _), d in zip(found, p, strict=True)}
    for name, reference, *_ in pairs:
        cells = [shown.get((name, reference, f)) for f in FIGURES]
        label = f"`{name}` − {'`ce`' if reference == 'ce' else reference}"
        rows.append([label, *(signed(d) if d else "–" for d in cells)])
    images = {d.images for d in p}
    seeds = sorted({len(of) for of in runs.values()})
    note = f"\nSeeds: {' or '.join(map(str, seeds))}; test images: {runs['ce'][0].results['images']}"
    note += "" if None in images else ", whose variation the intervals of differences hold too"
    return table(["", *FIGURES.values()], rows) + f"{note}. {len(p)} comparisons, corrected together.\n"


def compared_table(
    settings: Mapping[str, tuple[list[RunRecord], list[RunRecord]]], what: str, objective: str = "clce"
) -> str:
    """Per setting the runs of ``objective`` and of its reference, and the difference."""
    found = [difference(of, reference, f) for of, reference in settings.values() for f in ("top1", "knn")]
    p = iter(corrected(found))
    rows = []
    for name, (of, reference) in settings.items():
        seeds = {r.seed for r in of}
        same = [r for r in reference if r.seed in seeds]
        cells = [figure(r.results[f] for r in part) for f in ("top1", "knn") for part in (same, of)]
        top1, knn = signed(next(p)), signed(next(p))
        rows.append([name, str(len(of)), *cells[:2], top1, *cells[2:], knn])
    reference = next(iter(settings.values()))[1][0].objective
    head = [what, "seeds", f"`{reference}` top-1", f"`{objective}` top-1", "difference"]
    head += [f"`{reference}` neighbours", f"`{objective}` neighbours", "difference"]
    return table(head, rows) + f"\n{len(found)} comparisons, corrected together.\n"


def shots_table(by_shots: Mapping[int, Mapping[str, list[RunRecord]]], column: str) -> str:
    """Objectives by shots: one figure; the untouched backbone by logistic regression and by that figure."""
    objectives = [o for o in OBJECTIVES if any(o in runs for runs in by_shots.values())]
    rows = []
    for shots, runs in by_shots.items():
        untouched = untouched_records(runs["ce"])
        cells = [figure(r.results["probe"] for r in untouched)]
        cells += [figure(r.results[column] for r in runs[o]) if o in runs else "–" for o in objectives]
        rows.append([str(shots), *cells])
    head = ["images a class", "frozen features, logistic regression", *(f"`{o}`" for o in objectives)]
    return table(head, rows)


def by_shots(kind: str, shots: Iterable[int]) -> dict[int, dict[str, list[RunRecord]]]:
    """What has finished, by shots and objective, where there is a baseline."""
    found = {}
    for count in shots:
        name = f"{kind}-{count}-shots"
        folder = DEMO if (kind, count) == ("digits", 5) else None
        runs = {o: records(name, o, folder) or records(f"{name}-others", o) for o in OBJECTIVES}
        if runs["ce"]:
            found[count] = {o: of for o, of in runs.items() if of}
    return found


_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "clce_ext", "font.size": 10, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": "#e6e9ec", "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def comparison_plot(path: Path, runs: Mapping[str, list[RunRecord]], title: str) -> None:
    """Left, what each objective and the untouched backbone reach; right, clce less ce, with each seed's."""
    shown = {UNTOUCHED: untouched_records(runs["ce"])} | dict(runs)
    with plt.rc_context(_STYLE):
        picture, (left, right) = plt.subplots(
            1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=(3, 2)
        )
        for place, (name, of) in enumerate(shown.items()):
            figures = [f for f in FIGURES if f in of[0].results]
            x = [list(FIGURES).index(f) + 0.13 * (place - (len(shown) - 1) / 2) for f in figures]
            _bars(left, x, [_points(r.results[f] for r in of) for f in figures], name, name)
        ticks = [name.replace(" ", "\n") for name in FIGURES.values()]
        left.set_xticks(range(len(FIGURES)), ticks)
        left.set_ylabel("% of the test images")
        left.legend(
            frameon=False, fontsize=9, ncols=len(shown), loc="upper center", bbox_to_anchor=(0.5, -0.17)
        )
        right.axhline(0, color="#9aa3ab", linewidth=1)
        for x, name in enumerate(FIGURES):
            d = difference(runs["clce"], runs["ce"], name)
            right.plot(
                [x] * len(d.by_seed), 100 * np.array(d.by_seed), "o", color=color("clce"), alpha=0.25, ms=4
            )
            _bars(right, [x], [(100 * d.mean, 100 * d.half_width)], "clce", None)
        right.set_xticks(range(len(FIGURES)), ticks)
        right.set_title("clce − ce, percentage points", fontsize=10)
        _save(picture, path, title)


def shots_plot(path: Path, runs: Mapping[int, Mapping[str, list[RunRecord]]], title: str) -> None:
    """The classifier's and the neighbours' accuracy by images a class, with the untouched backbone's."""
    at = {shots: x for x, shots in enumerate(runs)}
    with plt.rc_context(_STYLE):
        picture, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
        for ax, column, frozen in zip(axes, ("top1", "knn"), ("probe", "knn"), strict=True):
            lines = {UNTOUCHED: {s: untouched_records(of["ce"]) for s, of in runs.items()}}
            lines |= {o: {s: of[o] for s, of in runs.items() if o in of} for o in OBJECTIVES}
            for name, of in lines.items():
                of_untouched = name == UNTOUCHED
                what = frozen if of_untouched else column
                label = f"untouched, {FIGURES[frozen]}" if of_untouched else name
                points = [_points(r.results[what] for r in records) for records in of.values()]
                if points:
                    _bars(ax, [at[s] for s in of], points, name, label, "-")
            ax.set_xticks(range(len(runs)), [str(s) for s in runs])
            ax.set_xlabel("training images a class")
            ax.set_title(FIGURES[column], fontsize=10)
            ax.legend(frameon=False, fontsize=8)
        axes[0].set_ylabel("% of the test images")
        _save(picture, path, title)


def _points(values: Iterable[float]) -> tuple[float, float]:
    """Percent: (mean, half of the 95 % interval), or 0 for what fewer than three values say of it."""
    values = np.array(list(values))
    interval = confidence_interval(values)
    if len(values) < 3:
        return 100 * interval.mean, 0.0
    return 100 * interval.mean, float(np.nan_to_num(100 * interval.half_width))


def _bars(
    ax: plt.Axes, x: Sequence[float], points: Sequence[tuple[float, float]], name: str, label: str | None,
    line: str = "none",
) -> None:  # fmt: skip
    means, halves = zip(*points, strict=True)
    style = {"color": color(name), "linestyle": line, "linewidth": 1.8, "elinewidth": 1.8, "label": label}
    ax.errorbar(x, means, halves, marker="o", markersize=5, capsize=0, **style)


def _save(picture: plt.Figure, path: Path, title: str) -> None:
    picture.suptitle(title, fontsize=11, fontweight="bold")
    picture.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(picture)


def episode_table() -> str:
    """Accuracy of 5-way episodes on novel characters, means over seeds."""
    rows = []
    for objective in (UNTOUCHED, *EPISODE_OBJECTIVES):
        files = sorted(RUNS.glob(f"episodes-{objective}*/figures.json"))
        figures = [json.loads(file.read_text()) for file in files]
        if figures:
            columns = [f"5way_{shots}shot_{head}" for shots in (1, 5) for head in ("centroid", "logistic")]
            name = "untouched" if objective == UNTOUCHED else f"`{objective}`"
            rows.append([name, str(len(files)), *(figure(f[c] for f in figures) for c in columns)])
    head = ["", "seeds", "1 shot, class means", "1 shot, logistic regression"]
    return table([*head, "5 shots, class means", "5 shots, logistic regression"], rows) if rows else ""


def sections(folder: Path) -> dict[str, str]:
    """The parts of the document that hold figures, of what has finished; plots are written to ``folder``."""
    found = {}
    for kind, shots in (("photographs", PHOTO_SHOTS), ("digits", SHOTS)):
        runs = by_shots(kind, shots)
        if "clce" in runs.get(5, {}):
            seeds = " or ".join(map(str, sorted({len(of) for of in runs[5].values()})))
            title = f"{kind}, 5 training images a class, {seeds} seeds"
            comparison_plot(folder / f"study-{kind}.svg", runs[5], title)
            picture = f"![What each objective reaches, {kind}](study-{kind}.svg)\n\n"
            found[kind] = picture + accuracy_table(runs[5])
        if len(runs) > 1:
            file = f"study-{kind}-shots.svg"
            shots_plot(folder / file, runs, f"{kind}, by training images a class")
            pairs = {str(s): (of["clce"], of["ce"]) for s, of in runs.items() if "clce" in of}
            found[f"{kind}-shots"] = "\n".join(
                [
                    f"![Accuracy by images a class, {kind}]({file})\n",
                    "Top-1:\n", shots_table(runs, "top1"),
                    "Neighbours:\n", shots_table(runs, "knn"),
                    "`clce` against `ce`:\n", compared_table(pairs, "images a class"),
                ]
            )  # fmt: skip
    scratch = {o: records("digits-from-scratch", o) for o in ("ce", "clce")}
    if all(scratch.values()):
        found["digits-from-scratch"] = accuracy_table(scratch)
    batches = {
        str(b): (records(f"digits-batch-{b}", "clce"), records(f"digits-batch-{b}", "ce")) for b in BATCHES
    }
    batches = {b: of for b, of in batches.items() if all(of)}
    if batches:
        found["digits-batches"] = compared_table(batches, "batch")
    ce, usual = records("", "ce", DEMO), records("", "clce", DEMO)
    options = {}
    for option, values in OPTIONS.items():
        for value in sorted({*values, DEFAULTS[option]}):
            own = usual if value == DEFAULTS[option] else records(f"digits-{option}-{value:g}", "clce")
            if own and ce:
                options[f"{SYMBOLS[option]} {value:g}"] = (own, ce)
    if len(options) > len(OPTIONS):
        found["digits-options"] = compared_table(options, "")
    if text := episode_table():
        found["episodes"] = text
    return found
