"""One HTML file per run or comparison: no script, no network, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from . import metrics, plots
from .config import TrainConfig
from .data import Images
from .intervals import SIGNIFICANT, Difference, difference, differences_of
from .judge import Outputs
from .objectives import UNTOUCHED
from .page import Cell, Section, drawn, interval_of, name_cell, number_cell, percent, table_of, write_page
from .results import RunRecord, untouched_records
from .start import versions

ACCURACIES = {
    "top1": "Top-1",
    "top5": "Top-5",
    "knn": "Neighbours",
    "centroid": "Centroid",
    "probe": "Probe",
}
GEOMETRY = {
    "recall@1": "Recall@1 ↑",
    "recall@4": "Recall@4 ↑",
    "map@r": "MAP@R ↑",
    "silhouette": "Silhouette ↑",
    "alignment": "Alignment ↓",
    "uniformity": "Uniformity ↓",
    "isotropy": "Isotropy ↑",
}
_MAP_POINTS = 1500
_MISTAKES, _PAIRS, _CLASSES = 12, 8, 12  # shown at most
_OF_ONE_RUN = ("objective", "seed", "output", "resume", "overwrite")
_STEADY = 1.15  # the longest over the shortest epoch of a stage where nothing else kept the machine busy


def write_run_report(
    folder: Path,
    config: TrainConfig,
    results: dict[str, Any],
    rows: list[dict[str, Any]],
    classes: Sequence[str],
    val: Outputs | None = None,
    images: Images | None = None,
    with_map: bool = True,
) -> None:
    """``folder/report.html`` of one run; ``val`` are the outputs for those of ``images`` that it is judged
    on."""
    embeddings, labels = (val.embeddings.numpy(), val.labels.numpy()) if val is not None else (None, None)
    record = RunRecord(config.objective, config.seed, results, rows, embeddings, labels)
    runs = {config.objective: [record]}
    untouched = untouched_records(runs[config.objective])
    sections = [_accuracies(runs, untouched), _curves_section(runs, with_losses=True)]
    if val is not None and images is not None:
        sections += [_classes(val, classes), _mistakes(val, images, classes), _hardest(val, images, classes)]
    sections += _embeddings(runs, classes) if with_map else []
    write_page(
        folder / "report.html",
        sections,
        title=f"{config.objective} on {_data_name(config)}",
        lead=(
            f"Top-1 {100 * results['top1']:.2f} % on {_judged_on(results)} after {results['epochs']} epochs."
        ),
        setting=_setting(config),
        options_title="Options of the run",
        options=_options(config),
    )


def write_comparison_report(
    path: Path,
    config: TrainConfig,
    runs: Mapping[str, list[RunRecord]],
    classes: Sequence[str],
    baseline: str,
    own: Mapping[str, Mapping[str, Any]],
) -> None:
    """Objectives x seeds: ``runs[objective]`` in the order of seeds, the same seeds everywhere; ``own`` are
    options of one objective alone."""
    first = next(iter(runs.values()))
    untouched = untouched_records(first)
    differences = differences_of(runs, untouched, baseline)
    sections = [
        _accuracies(runs, untouched),
        _difference_section(differences),
        _curves_section(runs),
        _classes_by_objective(runs, classes),
        *_embeddings(runs, classes),
        _cost(runs),
        Section(
            "Runs",
            "Photographs of the worst mistakes and the hardest negatives are in each run's own report.",
            links=[
                (f"{name}, seed {r.seed}", f"runs/{name}-seed{r.seed}/report.html")
                for name, records in runs.items()
                for r in records
            ],
        ),
    ]
    epochs = max(record.results["epochs"] for records in runs.values() for record in records)
    write_page(
        path,
        sections,
        title=f"{' · '.join(runs)} on {_data_name(config)}",
        lead=(
            f"{len(runs)} objectives, {len(first)} seed{'s' * (len(first) > 1)}, {epochs} epochs each on "
            f"{first[0].results['train_images']} training images; judged on {_judged_on(first[0].results)}."
            f"{_standing(differences, baseline, 'top1')}{_standing(differences, baseline, 'knn')}"
        ),
        setting=_setting(config, {option for options in own.values() for option in options}),
        options_title="Options shared by the runs",
        options=_options(config, own),
    )


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
    rows = [
        [
            name_cell(s.objective),
            *(Cell(str(s.point.get(option, "–"))) for option in grid),
            percent(s.interval, bold=s.chosen),
        ]
        for s in sorted(settings, key=lambda s: (names.index(s.objective), -s.interval.mean))
    ]
    figures = []
    for option, values in grid.items():
        lines = {}
        for name in names:
            of = {
                v: [s for s in settings if s.objective == name and s.point.get(option) == v] for v in values
            }
            lines[name] = [(value, [s.interval for s in having]) for value, having in of.items() if having]
        if any(len(points) > 1 for points in lines.values()):
            figures.append(drawn(plots.sweep_curves(lines, f"{ACCURACIES[metric]} by {option}")))
    judged = []
    for s in settings if split else ():
        if s.chosen:
            figure = percent(interval_of(s.records, metric))
            half = f" ± {figure.half}" if figure.half else ""
            judged.append((s.objective, f"{figure.text}{half} %, {_judged_on(s.records[0].results)}"))
    head = ["", *grid, f"{ACCURACIES[metric]}, {settings[0].records[0].results['split']}"]
    note = "Percent, mean over seeds ± half of the 95 % interval; the best of each objective stands out."
    sections = [
        Section("Settings", table={"head": head, "rows": rows}, note=note),
        Section("What was chosen, on a split that chose nothing", said=judged) if judged else None,
        Section(
            "By option",
            figures=figures,
            note="Lines join the best of each value; dots are all settings. Bars are 95 % intervals.",
        )
        if figures
        else None,
    ]
    write_page(
        path,
        sections,
        title=f"Sweep on {_data_name(config)}",
        lead=f"{len(settings)} settings of {', '.join(names)}, chosen by {ACCURACIES[metric].lower()}.",
        setting=_setting(config, set(grid)),
        options_title="Options shared by the runs",
        options=_options(config, {"grid": grid}),
    )


# Texts and cells


def _judged_on(results: Mapping[str, Any]) -> str:
    return f"{results['images']} images of the {results['split']} split"


def _data_name(config: TrainConfig) -> str:
    return Path(config.data).name if config.data_is_folder else config.data


def _setting(config: TrainConfig, varied: Sequence[str] | set[str] = ()) -> str:
    parts = [config.model] if "model" not in varied else []
    if config.shots and "shots" not in varied:
        parts.append(f"{config.shots} training images of each class")
    if "batch_size" not in varied:
        balanced = f", {config.images_per_class} of a class" if config.images_per_class else ""
        parts.append(f"batches of {config.batch_size} images{balanced}")
    return "; ".join(parts) + "." if parts else ""


def _options(config: TrainConfig, own: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Of one run, or those that all runs of a comparison share, and then those of one objective alone."""
    options = config.to_dict()
    if own is not None:
        varied = {option for of in own.values() for option in of}
        options = {k: v for k, v in options.items() if k not in _OF_ONE_RUN and k not in varied}
    text = yaml.safe_dump(options, sort_keys=False)
    for name, of in (own or {}).items():
        text += f"# {name}: " + ", ".join(f"{option} {value}" for option, value in of.items()) + "\n"
    return text + "".join(f"# {name} {version}\n" for name, version in versions().items())


# Sections of accuracy


def _accuracies(runs: Mapping[str, list[RunRecord]], untouched: list[RunRecord]) -> Section:
    columns = {k: v for k, v in ACCURACIES.items() if all(k in r.results for rs in runs.values() for r in rs)}
    shown = ({UNTOUCHED: untouched} if untouched else {}) | dict(runs)
    winners = {column: _winner(shown, column) for column in columns}
    rows = {
        name: [percent(interval_of(records, c), bold=winners[c] == name) for c in columns]
        for name, records in shown.items()
    }
    note = "Percent. "
    if max(map(len, runs.values())) > 1:
        note = (
            "Percent, mean over seeds ± half of the 95 % interval (Student's t). Bold is ahead of all others "
            "by more than the interval of the paired difference; where nothing is bold, nothing is. "
        )
    note += (
        "Top-k is the trained classifier's. Neighbours (20, weighed by similarity), centroid (nearest class "
        "mean) and probe (logistic regression) look only at the frozen embeddings, with the training images "
        "as references."
    )
    if untouched:
        note += " Untouched is the given backbone before the first step."
    return Section("Accuracy", table=table_of(rows, columns), note=note)


def _winner(shown: Mapping[str, Sequence[RunRecord]], column: str) -> str | None:
    """Who is ahead of every other by more than chance explains, if anybody."""
    having = {name: records for name, records in shown.items() if all(column in r.results for r in records)}
    if len(having) < 2:
        return None
    best = max(having, key=lambda name: interval_of(having[name], column).mean)
    against = [difference(having[best], records, column) for name, records in having.items() if name != best]
    return best if all(d.mean - d.half_width > 0 for d in against) else None


def _difference_section(differences: Sequence[Difference]) -> Section | None:
    groups: dict[tuple[str, str], list[Difference]] = {}
    for found in differences:
        groups.setdefault((found.figure, found.reference), []).append(found)
    if not groups:
        return None
    images = {found.images for found in differences}
    what = (
        "of the seeds, not that of the images"
        if None in images
        else f"of seeds and of images ({', '.join(map(str, sorted(images)))}), both drawn anew"
    )
    return Section(
        "Paired differences",
        figures=[_differences(group) for group in groups.values()],
        note="Small dots are seeds: the same subset and the same order of images for both sides. Bars are "
        f"95 % intervals of each mean difference alone, and hold the variation {what}. Above and below are "
        f"said where p < {SIGNIFICANT} with Holm's correction for the {len(differences)} comparisons here.",
    )


def _differences(group: Sequence[Difference]) -> dict[str, Any]:
    """One figure, a line per objective, and what it says in words."""
    rows = [
        (d.objective, [100 * value for value in d.by_seed], 100 * d.mean, 100 * d.half_width) for d in group
    ]
    title = f"{ACCURACIES[group[0].figure]} against {group[0].reference}, paired"
    return drawn(plots.differences(rows, title), [(d.objective, _verdict(d)) for d in group])


def _verdict(d: Difference) -> str:
    text = f"{100 * d.mean:+.2f} points"
    if not math.isfinite(d.half_width):
        why = "one seed" if len(d.by_seed) == 1 else "nothing varies"
        return f"{text} ({why}: no interval)"
    low, high = 100 * (d.mean - d.half_width), 100 * (d.mean + d.half_width)
    return f"{text} [{low:+.2f}, {high:+.2f}], {d.verdict} {d.reference} (p {d.corrected_p:.2g})"


def _standing(differences: Sequence[Difference], baseline: str, figure: str) -> str:
    """A sentence on who stands where; an objective that chance may have put ahead is not called better."""
    names: dict[str, list[str]] = {}
    for d in differences:
        if (d.reference, d.figure) == (baseline, figure) and len(d.by_seed) > 1:
            names.setdefault(d.verdict, []).append(d.objective)
    if not names:
        return ""
    said = "; ".join(f"{', '.join(of)} {verdict} {baseline}" for verdict, of in names.items())
    return f" {ACCURACIES[figure]}: {said}."


def _classes(val: Outputs, classes: Sequence[str]) -> Section:
    rows = val.by_class(classes)
    worst = sorted(rows, key=lambda row: row["accuracy"])[:_CLASSES]
    body = [
        [
            Cell(row["class"]),
            Cell(f"{100 * row['accuracy']:.1f}"),
            Cell(str(row["images"])),
            Cell(f"{row['taken_for']} ({row['times']})" if row["times"] else "–"),
        ]
        for row in worst
    ]
    which = (
        f"The {len(worst)} of {len(rows)} classes that are found least often."
        if len(worst) < len(rows)
        else "Those that are found least often first."
    )
    head = ["Class", "Top-1", "Images", "Most often taken for"]
    return Section("Classes", which, table={"head": head, "rows": body})


def _classes_by_objective(runs: Mapping[str, list[RunRecord]], classes: Sequence[str]) -> Section | None:
    """Mean over seeds, of the classes that are hardest for all together."""
    records = [record for of in runs.values() for record in of]
    if any(r.labels is None or len(r.correct.get("top1", ())) != len(r.labels) for r in records):
        return None
    present = np.unique(records[0].labels)
    accuracy = {
        name: np.mean([[r.correct["top1"][r.labels == c].mean() for c in present] for r in of], axis=0)
        for name, of in runs.items()
    }
    order = np.argsort(np.mean(list(accuracy.values()), axis=0))[:_CLASSES]
    body = [
        [Cell(classes[present[i]]), *(Cell(f"{100 * values[i]:.1f}") for values in accuracy.values())]
        for i in order
    ]
    which = f"The {len(order)} of {len(present)} classes that are hardest for all together; " * (
        len(order) < len(present)
    )
    text = f"{which}top-1 in percent, mean over seeds."
    return Section("Classes", text[0].upper() + text[1:], table={"head": ["Class", *runs], "rows": body})


# Sections of photographs


def _mistakes(val: Outputs, images: Images, classes: Sequence[str]) -> Section | None:
    wrong = (~val.correct()).nonzero()[:, 0]
    worst = wrong[val.confidence[wrong, 0].argsort(descending=True, stable=True)][:_MISTAKES].tolist()
    photos = [
        {
            "images": [_photograph(images, val, i)],
            "text": f"{classes[val.top[i, 0]]}, {100 * val.confidence[i, 0]:.0f} %; "
            f"it is {classes[val.labels[i]]}",
        }
        for i in worst
    ]
    text = "Wrong, and surest of it: what the classifier says, how sure it is, and what it is."
    return Section("Worst mistakes", text, photos=photos) if photos else None


def _hardest(val: Outputs, images: Images, classes: Sequence[str]) -> Section | None:
    pairs = metrics.hardest_pairs(val.embeddings.numpy(), val.labels.numpy(), _PAIRS)
    photos = [
        {
            "images": [_photograph(images, val, i), _photograph(images, val, j)],
            "text": f"{classes[val.labels[i]]} and {classes[val.labels[j]]}, cosine {cosine:.3f}",
        }
        for i, j, cosine in pairs
    ]
    text = "Images of different classes whose embeddings are most alike."
    return Section("Hardest negatives", text, photos=photos) if photos else None


def _photograph(images: Images, val: Outputs, i: int) -> str:
    return plots.photograph(images.source.image(int(images.indices[val.rows[i]])))


# Sections of curves, embeddings and cost


def _curves_section(runs: Mapping[str, list[RunRecord]], with_losses: bool = False) -> Section:
    accuracies = {"top1": "Top-1, classifier", "centroid": "Nearest centroid", "knn": "Nearest neighbours"}
    losses = {"loss": "Training loss", "ce": "Cross-entropy half", "contrast": "Contrastive half"}
    figures = [_curves(runs, column, title, 100.0, "%") for column, title in accuracies.items()]
    if with_losses:
        figures += [_curves(runs, column, title, 1.0, "nats") for column, title in losses.items()]
    return Section(
        "Learning curves",
        figures=[drawn(svg) for svg in figures if svg],
        note="Accuracy per epoch on the split that training watches: val, or test where there is no val. "
        "Thin lines are seeds. Objectives of two stages have a classifier only in the second one.",
    )


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


def _embeddings(runs: Mapping[str, list[RunRecord]], classes: Sequence[str]) -> list[Section]:
    shown = {name: records[0] for name, records in runs.items() if records[0].embeddings is not None}
    if not shown:
        return []
    maps = []
    for name, record in shown.items():
        points, labels, method = map_points(record.embeddings, record.labels)
        maps.append(drawn(plots.embedding_map(points, labels, classes, name)))
    counts = {name: metrics.cosine_histograms(r.embeddings, r.labels, 100) for name, r in shown.items()}
    # One axis for all: from the lowest cosine that occurs.
    low = min(h["edges"][:-1][h["within"] + h["between"] > 0].min() for h in counts.values())
    histograms = [drawn(plots.cosine_histogram(h, name, name, low)) for name, h in counts.items()]
    rows = {name: [number_cell(interval_of(of, c), 1, 3) for c in GEOMETRY] for name, of in runs.items()}
    seed = next(iter(shown.values())).seed
    return [
        Section(
            "Embeddings",
            f"The images judged on, seed {seed}, {method} of the normalised embeddings. Only neighbourhoods "
            "mean something on such a map; distances across it do not.",
            figures=maps,
        ),
        Section(
            "Cosines within and between classes",
            "The further apart the two, the easier it is to tell classes by the embedding alone.",
            figures=histograms,
        ),
        Section(
            "Retrieval and geometry",
            table=table_of(rows, GEOMETRY),
            note="Among the images judged on. Recall@K: one of the K nearest others is of the same class. "
            "MAP@R: Musgrave et al., arXiv 2003.08505. Silhouette by cosine distance, in [-1, 1]. Alignment: "
            "mean squared distance within a class. Uniformity: log mean exp(-2 · squared distance) over all "
            "pairs (both: Wang & Isola, arXiv 2005.10242). Isotropy: smallest over largest partition "
            "function along the principal directions (Mu & Viswanath, arXiv 1702.01417), 1 is isotropic. "
            "Embeddings normalised.",
        ),
    ]


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


def _cost(runs: Mapping[str, list[RunRecord]]) -> Section:
    if not all(is_steady(record.rows) for records in runs.values() for record in records):
        return Section(
            "Cost",
            "Time per epoch is not shown: epochs of the same stage took unlike times, so that something else "
            "must have kept the machine busy, or they are too few to tell.",
        )
    values = {}
    for name, records in runs.items():
        interval = metrics.confidence_interval(np.array([r.results["seconds_per_epoch"] for r in records]))
        values[name] = (interval.mean, interval.half_width)
    return Section(
        "Cost",
        figures=[drawn(plots.bars(values, "Training time per epoch", "s"))],
        note="Forward, backward and data loading on the machine of these runs, without evaluation. Two views "
        "double the images; a frozen backbone in the head stage makes its epochs cheap. Epochs of the same "
        f"stage took the same time within {round(100 * (_STEADY - 1))} %.",
    )


def is_steady(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the epochs of each stage took the same time, the first of all aside, which warms up."""
    stages: dict[str, list[float]] = {}
    for row in rows[1:]:
        stages.setdefault(row["stage"], []).append(row["seconds"])
    return bool(stages) and all(
        len(times) > 1 and max(times) <= _STEADY * min(times) for times in stages.values()
    )
