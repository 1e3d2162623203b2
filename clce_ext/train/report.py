"""One HTML file per run or comparison: no script, no network, readable on a phone."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import clce_ext

from . import metrics, plots
from .checkpoint import write_text
from .config import TrainConfig
from .intervals import SIGNIFICANT, Difference, differences_of
from .objectives import UNTOUCHED
from .results import RunRecord, untouched_records

ACCURACIES = {
    "top1": "Top-1",
    "top5": "Top-5",
    "knn": "Neighbours",
    "centroid": "Centroid",
    "probe": "Probe",
}
GEOMETRY = {
    "silhouette": "Silhouette ↑",
    "alignment": "Alignment ↓",
    "uniformity": "Uniformity ↓",
    "isotropy": "Isotropy ↑",
}
_MAP_POINTS = 1500

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 1.2rem 1rem 3rem; background: #fff; color: #1d2429;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; padding-top: .6rem; border-top: 2px solid #e6e9ec; }
p { margin: .4rem 0; max-width: 46rem; }
ul { padding-left: 1.2rem; }
.muted { color: #5b6770; font-size: .92rem; }
.lead { font-size: 1.08rem; }
.grid { display: grid; gap: 1rem 1.4rem;
        grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
figure { margin: .4rem 0; max-width: 520px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { padding: .35rem .8rem .35rem 0; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #e6e9ec; }
th { color: #5b6770; font-weight: 600; font-size: .88rem; vertical-align: bottom; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; text-align: left; }
td small { color: #5b6770; }
td.best { font-weight: 700; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
details { margin-top: 1rem; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; background: #f5f7f8; padding: .8rem; border-radius: 6px;
      font-size: .82rem; line-height: 1.4; }
@media (max-width: 480px) {
  body { font-size: 15px; }
  h1 { font-size: 1.35rem; }
  table { font-size: .82rem; }
  th, td { padding-right: .45rem; }
  th { font-size: .75rem; }
  td small { display: block; }
}
"""


def write_run_report(
    folder: Path,
    config: TrainConfig,
    results: dict[str, Any],
    rows: list[dict[str, Any]],
    classes: Sequence[str],
    val: Any = None,
) -> None:
    """``folder/report.html`` of one run; ``val`` has its validation embeddings and labels."""
    embeddings, labels = (val.embeddings.numpy(), val.labels.numpy()) if val is not None else (None, None)
    record = RunRecord(config.objective, config.seed, results, rows, embeddings, labels)
    runs = {config.objective: [record]}
    untouched = untouched_records(runs[config.objective])
    parts = [
        _accuracy_section(runs, untouched),
        _curves_section(runs, with_losses=True),
        _geometry_section(runs, classes),
        _options("Options of the run", config.dump()),
    ]
    lead = f"Top-1 {100 * results['top1']:.2f} % on {_judged_on(results)} after {results['epochs']} epochs."
    title = f"{config.objective} on {_data_name(config)}"
    write_text(folder / "report.html", _page(title, lead, config, parts))


def write_comparison_report(
    path: Path,
    config: TrainConfig,
    runs: Mapping[str, list[RunRecord]],
    classes: Sequence[str],
    baseline: str,
) -> None:
    """Objectives x seeds: ``runs[objective]`` in the order of seeds, the same seeds everywhere."""
    seeds = [record.seed for record in next(iter(runs.values()))]
    untouched = untouched_records(next(iter(runs.values())))
    differences = differences_of(runs, untouched, baseline)
    parts = [
        _accuracy_section(runs, untouched),
        _difference_section(differences),
        _curves_section(runs),
        _geometry_section(runs, classes),
        _cost_section(runs),
        _options("Options shared by the runs", config.dump()),
    ]
    first = next(iter(runs.values()))[0].results
    title = f"{' · '.join(runs)} on {_data_name(config)}"
    epochs = max(record.results["epochs"] for records in runs.values() for record in records)
    lead = (
        f"{len(runs)} objectives, {len(seeds)} seed{'s' * (len(seeds) > 1)}, {epochs} epochs each on "
        f"{first['train_images']} training images; judged on {_judged_on(first)}."
        f"{_standing(differences, baseline, 'top1')}{_standing(differences, baseline, 'knn')}"
    )
    write_text(path, _page(title, lead, config, parts))


def write_sweep_report(
    path: Path,
    config: TrainConfig,
    settings: Sequence[Any],
    grid: Mapping[str, Sequence[Any]],
    metric: str,
    split: str | None,
) -> None:
    """A table of ``settings`` (sweep.Setting) and, per option of the grid, how the metric follows it."""
    names = list(dict.fromkeys(s.objective for s in settings))
    head = ["", *grid, f"{ACCURACIES[metric]}, {settings[0].records[0].results['split']}"]
    body = []
    for s in sorted(settings, key=lambda s: (names.index(s.objective), -s.interval.mean)):
        figure = _percent(s.interval)
        cells = [_name_cell(s.objective), *(html.escape(str(s.point.get(option, "–"))) for option in grid)]
        cells.append(f"<b>{figure}</b>" if s.chosen else figure)
        body.append("".join(f"<td>{cell}</td>" for cell in cells))
    table = _plain_table(head, body)
    note = "Percent, mean over seeds ± half of the 95 % interval; the best of each objective stands out."
    parts = [_section("Settings", table, _note(note))]
    if split:
        lines = [
            f"<li><b>{html.escape(s.objective)}</b>: {_percent(_interval_of(s.records, metric))} %, "
            f"{_judged_on(s.records[0].results)}</li>"
            for s in settings
            if s.chosen
        ]
        parts.append(_section("What was chosen, on a split that chose nothing", f"<ul>{''.join(lines)}</ul>"))
    figures = []
    for option, values in grid.items():
        lines = {
            name: [
                (
                    value,
                    [s.interval for s in settings if s.objective == name and s.point.get(option) == value],
                )
                for value in values
            ]
            for name in names
        }
        lines = {name: [(v, of) for v, of in points if of] for name, points in lines.items()}
        if any(len(points) > 1 for points in lines.values()):
            figures.append(plots.sweep_curves(lines, f"{ACCURACIES[metric]} by {option}"))
    note = "Lines join the best of each value; dots are all settings. Bars are 95 % intervals over seeds."
    parts += [_section("By option", _grid(figures), _note(note))] if figures else []
    parts.append(_options("Options shared by the runs", config.dump()))
    lead = f"{len(settings)} settings of {', '.join(names)}, chosen by {ACCURACIES[metric].lower()}."
    write_text(path, _page(f"Sweep on {_data_name(config)}", lead, config, parts))


def _interval_of(records: Sequence[RunRecord], column: str) -> metrics.Interval:
    return metrics.confidence_interval(np.array([r.results.get(column, math.nan) for r in records]))


def _percent(interval: metrics.Interval) -> str:
    half = f" <small>± {100 * interval.half_width:.1f}</small>" if math.isfinite(interval.half_width) else ""
    return f"{100 * interval.mean:.1f}{half}"


# Sections


def _accuracy_section(runs: Mapping[str, list[RunRecord]], untouched: list[RunRecord]) -> str:
    names = {k: v for k, v in ACCURACIES.items() if all(k in r.results for rs in runs.values() for r in rs)}
    unit = (
        "Percent, mean over seeds ± half of the 95 % interval (Student's t)."
        if max(map(len, runs.values())) > 1
        else "Percent."
    )
    rows = ({UNTOUCHED: untouched} if untouched else {}) | dict(runs)
    table = _table(rows, names, lambda v: f"{100 * v:.1f}", lambda v: f"{100 * v:.1f}", best=max)
    note = (
        f"{unit} Top-k is the trained classifier's. Neighbours, centroid (nearest class mean) and probe "
        "(logistic regression) look only at the frozen embeddings, with the training images as references."
    )
    if untouched:
        note += " Untouched is the given backbone before the first step."
    return _section("Accuracy", table, _note(note))


def _difference_section(differences: Sequence[Difference]) -> str:
    groups: dict[tuple[str, str], list[Difference]] = {}
    for found in differences:
        groups.setdefault((found.figure, found.reference), []).append(found)
    if not groups:
        return ""
    images = {found.images for found in differences}
    what = (
        "of the seeds, not that of the images"
        if None in images
        else f"of seeds and of images ({', '.join(map(str, sorted(images)))}), both drawn anew"
    )
    note = _note(
        "Small dots are seeds: the same subset and the same order of images for both sides. Bars are 95 % "
        f"intervals of each mean difference alone, and hold the variation {what}. Above and below are said "
        f"where p < {SIGNIFICANT} with Holm's correction for the {len(differences)} comparisons made here."
    )
    parts = [_differences(group) for group in groups.values()]
    return _section("Paired differences", f"<div class=grid>{''.join(parts)}</div>", note)


def _differences(group: Sequence[Difference]) -> str:
    """One figure, a line per objective, and what it says in words."""
    rows = [
        (d.objective, [100 * value for value in d.by_seed], 100 * d.mean, 100 * d.half_width) for d in group
    ]
    title = f"{ACCURACIES[group[0].figure]} against {group[0].reference}, paired"
    sentences = "".join(f"<li>{_verdict(d)}</li>" for d in group)
    return f"<div><figure>{plots.differences(rows, title)}</figure><ul>{sentences}</ul></div>"


def _standing(differences: Sequence[Difference], baseline: str, figure: str) -> str:
    """A sentence on who stands where; an objective that chance may have put ahead is not called better."""
    names: dict[str, list[str]] = {}
    for d in differences:
        if (d.reference, d.figure) == (baseline, figure) and math.isfinite(d.half_width):
            names.setdefault(d.verdict, []).append(d.objective)
    if not names:
        return ""
    said = "; ".join(f"{', '.join(of)} {verdict} {baseline}" for verdict, of in names.items())
    return f" {ACCURACIES[figure]}: {said}."


def _verdict(d: Difference) -> str:
    text = f"<b>{html.escape(d.objective)}</b>: {100 * d.mean:+.2f} points"
    if not math.isfinite(d.half_width):
        return text + " (one seed: no interval)"
    low, high = 100 * (d.mean - d.half_width), 100 * (d.mean + d.half_width)
    return f"{text} [{low:+.2f}, {high:+.2f}], {d.verdict} {html.escape(d.reference)} (p {d.corrected_p:.2g})"


def _curves_section(runs: Mapping[str, list[RunRecord]], with_losses: bool = False) -> str:
    accuracies = {"top1": "Top-1, classifier", "centroid": "Nearest centroid", "knn": "Nearest neighbours"}
    losses = {"loss": "Training loss", "ce": "Cross-entropy half", "contrast": "Contrastive half"}
    figures = [_curves(runs, column, title, 100.0, "%") for column, title in accuracies.items()]
    if with_losses:
        figures += [_curves(runs, column, title, 1.0, "nats") for column, title in losses.items()]
    note = _note(
        "Accuracy per epoch on the split that training watches: val, or test where there is no val. Thin "
        "lines are seeds. Objectives of two stages have a classifier only in the second one."
    )
    return _section("Learning curves", _grid(figures), note)


def _curves(
    runs: Mapping[str, list[RunRecord]], column: str, title: str, scale: float, unit: str
) -> str | None:
    curves = {name: [_curve(r, column, scale) for r in records] for name, records in runs.items()}
    curves = {name: c for name, c in curves.items() if all(len(epochs) for epochs, _ in c)}
    return plots.learning_curves(curves, title, unit) if curves else None


def _curve(record: RunRecord, column: str, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(epochs counted through the stages, values) where the column has a value."""
    points = [
        (i + 1, scale * row[column]) for i, row in enumerate(record.rows) if row.get(column) is not None
    ]
    epochs, values = np.array(points, dtype=float).reshape(-1, 2).T
    return epochs, values


def _geometry_section(runs: Mapping[str, list[RunRecord]], classes: Sequence[str]) -> str:
    shown = {name: records[0] for name, records in runs.items() if records[0].embeddings is not None}
    if not shown:
        return ""
    maps = []
    for name, record in shown.items():
        points, labels, method = map_points(record.embeddings, record.labels)
        maps.append(plots.embedding_map(points, labels, classes, name))
    counts = {name: metrics.cosine_histograms(r.embeddings, r.labels, 100) for name, r in shown.items()}
    # One axis for all: from the lowest cosine that occurs.
    low = min(h["edges"][:-1][h["within"] + h["between"] > 0].min() for h in counts.values())
    histograms = [plots.cosine_histogram(histogram, name, name, low) for name, histogram in counts.items()]
    seed = next(iter(shown.values())).seed
    table = _table(runs, GEOMETRY, lambda v: f"{v:.3f}", lambda v: f"{v:.3f}", best=None)
    return (
        _section(
            "Embeddings",
            f"<p>The images judged on, seed {seed}, {method} of the normalised embeddings. Only "
            "neighbourhoods mean something on such a map; distances across it do not.</p>",
            _grid(maps),
        )
        + _section(
            "Cosines within and between classes",
            "<p>The further apart the two, the easier it is to tell classes by the embedding alone.</p>",
            _grid(histograms),
        )
        + _section(
            "Geometry",
            table,
            _note(
                "Silhouette by cosine distance, in [-1, 1]. Alignment: mean squared distance within a class. "
                "Uniformity: log mean exp(-2 · squared distance) over all pairs (both: Wang &amp; Isola, "
                "arXiv 2005.10242). Isotropy: smallest over largest partition function along the principal "
                "directions (Mu &amp; Viswanath, arXiv 1702.01417), 1 is isotropic. Embeddings normalised."
            ),
        )
    )


def map_points(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """(points [n, 2], labels [n], name of the method): t-SNE, or PCA of fewer than 30 images."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = metrics.normalized(x)
    if len(x) > _MAP_POINTS:
        chosen = np.sort(np.random.default_rng(0).choice(len(x), _MAP_POINTS, replace=False))
        x, labels = x[chosen], labels[chosen]
    if len(x) < 30:
        return PCA(2, random_state=0).fit_transform(x), labels, "principal components"
    x = PCA(min(50, *x.shape), random_state=0).fit_transform(x)
    tsne = TSNE(2, init="pca", perplexity=min(30, len(x) // 4), max_iter=500, random_state=0)
    return tsne.fit_transform(x), labels, "t-SNE"


def _cost_section(runs: Mapping[str, list[RunRecord]]) -> str:
    values = {}
    for name, records in runs.items():
        interval = metrics.confidence_interval(np.array([r.results["seconds_per_epoch"] for r in records]))
        values[name] = (interval.mean, interval.half_width)
    note = _note(
        "Forward, backward and data loading on the machine of these runs, without evaluation. Two views "
        "double the images; a frozen backbone in the head stage makes its epochs cheap."
    )
    return _section("Cost", _grid([plots.bars(values, "Training time per epoch", "s")]), note)


def _options(title: str, text: str) -> str:
    version = html.escape(str(clce_ext.__version__))
    return f"<details><summary>{title}</summary><pre>{html.escape(text)}clce_ext: {version}</pre></details>"


def _table(
    runs: Mapping[str, list[RunRecord]],
    columns: Mapping[str, str],
    show: Callable[[float], str],
    show_half: Callable[[float], str],
    best: Callable | None,
) -> str:
    intervals = {name: {c: _interval_of(records, c) for c in columns} for name, records in runs.items()}
    body = []
    for name in runs:
        cells = [f"<td>{_name_cell(name)}</td>"]
        for column in columns:
            interval = intervals[name][column]
            means = [i[column].mean for i in intervals.values() if math.isfinite(i[column].mean)]
            is_best = best and len(means) > 1 and interval.mean == best(means)
            half = (
                f" <small>± {show_half(interval.half_width)}</small>"
                if math.isfinite(interval.half_width)
                else ""
            )
            value = show(interval.mean) if math.isfinite(interval.mean) else "n/a"
            cells.append(f"<td{' class=best' if is_best else ''}>{value}{half}</td>")
        body.append("".join(cells))
    return _plain_table(["", *columns.values()], body)


def _name_cell(objective: str) -> str:
    dot = f'<span class=dot style="background:{plots.color(objective)}"></span>'
    return f"{dot}{html.escape(objective)}"


def _plain_table(head: Sequence[str], rows: Sequence[str]) -> str:
    """Titles of columns, and the cells of each row as HTML."""
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class=scroll><table><tr>{titles}</tr>{body}</table></div>"


def _section(title: str, *parts: str) -> str:
    return f"<h2>{title}</h2>{''.join(parts)}"


def _note(text: str) -> str:
    return f"<p class=muted>{text}</p>"


def _grid(figures: Sequence[str | None]) -> str:
    return f"<div class=grid>{''.join(f'<figure>{figure}</figure>' for figure in figures if figure)}</div>"


def _judged_on(results: Mapping[str, Any]) -> str:
    return f"{results['images']} images of the {results['split']} split"


def _data_name(config: TrainConfig) -> str:
    return Path(config.data).name if config.data_is_folder else config.data


def _page(title: str, lead: str, config: TrainConfig, parts: Sequence[str]) -> str:
    few = f", {config.shots} images per class" if config.shots else ""
    setting = f"{config.model}, batches of {config.batch_size}{few}."
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>"
        f"<p class=lead>{html.escape(lead)}</p>"
        f"{_note(html.escape(setting))}{''.join(parts)}"
        "</body></html>\n"
    )
