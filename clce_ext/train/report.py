"""One HTML file per run or comparison: no script, no network, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from sklearn.metrics import confusion_matrix

from . import metrics, plots
from .config import TrainConfig
from .data import Images
from .intervals import SIGNIFICANT, Difference, corrected, difference, differences_of
from .judge import Outputs
from .objectives import LOSS_OPTIONS, OBJECTIVES, UNTOUCHED
from .page import Section, cell, interval_of, name_cell, spread, table_of, write_page
from .results import RunRecord, Setting, untouched_records
from .start import versions

Runs = Mapping[str, Sequence[RunRecord]]  # by objective, in the order of seeds

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
_CURVES = {"top1": "Top-1, classifier", "centroid": "Nearest centroid", "knn": "Nearest neighbours"}
_LOSSES = {"loss": "Training loss", "ce": "Cross-entropy half", "contrast": "Contrastive half"}
_SHOWN = 1500  # images on a map and in a histogram
_MISTAKES, _PAIRS, _CLASSES, _CONFUSED = 12, 8, 12, 20  # shown at most
# Options that no comparison shares.
OF_ONE_RUN = ("objective", "seed", "output", "resume", "overwrite", "plan")
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
    tensors = (val.embeddings.numpy(), val.labels.numpy()) if val is not None else ()
    runs = {config.objective: [RunRecord(config.objective, config.seed, results, rows, *tensors)]}
    sections = [_accuracies(runs), _curves(runs, _CURVES | _LOSSES)]
    if val is not None and images is not None:
        sections += [_classes(val, classes), _mistakes(val, images, classes), _hardest(val, images, classes)]
    sections += _embeddings(runs, classes) if with_map else []
    lead = f"Top-1 {100 * results['top1']:.2f} % on {_judged_on(results)} after {results['epochs']} epochs."
    _write(folder / "report.html", config, config.objective, lead, sections, results)


def write_comparison_report(
    path: Path,
    config: TrainConfig,
    runs: Runs,
    classes: Sequence[str],
    baseline: str,
    own: Mapping[str, Mapping[str, Any]],
) -> None:
    """Objectives x seeds, the same seeds everywhere; ``own`` are options of one objective alone."""
    first = next(iter(runs.values()))
    records = [record for of in runs.values() for record in of]
    differences = differences_of(runs, untouched_records(first), baseline)
    links = [
        (f"{r.objective}, seed {r.seed}", f"runs/{r.objective}-seed{r.seed}/report.html") for r in records
    ]
    photographs = "Photographs of the worst mistakes and the hardest negatives are in each run's own report."
    sections = [
        _accuracies(runs),
        _differences(differences),
        _curves(runs, _CURVES),
        _classes_by_objective(runs, classes),
        *_embeddings(runs, classes),
        _cost(runs),
        Section("Runs", photographs, links=links),
    ]
    lead = (
        f"{len(runs)} objectives, {len(first)} seed{'s' * (len(first) > 1)}, "
        f"{max(r.results['epochs'] for r in records)} epochs each on {first[0].results['train_images']} "
        f"training images; judged on {_judged_on(first[0].results)}."
        f"{_standing(differences, baseline, 'top1')}{_standing(differences, baseline, 'knn')}"
    )
    _write(path, config, " · ".join(runs), lead, sections, first[0].results, own)


def write_sweep_report(
    path: Path,
    config: TrainConfig,
    settings: Sequence[Setting],
    grid: Mapping[str, Sequence[Any]],
    metric: str,
) -> None:
    """A table of the settings and, per option of the grid, how the metric follows it."""
    names = list(dict.fromkeys(s.objective for s in settings))
    figure, watched = ACCURACIES[metric], settings[0].records[0].results["split"]
    table = [["", *grid, f"{figure}, {watched}"]]
    for s in sorted(settings, key=lambda s: (names.index(s.objective), -s.interval.mean)):
        values = [str(s.point.get(option, "–")) for option in grid]
        table.append([name_cell(s.objective), *values, cell(spread(s.interval), bold=s.chosen)])
    svgs = []
    for option, values in grid.items():
        lines: dict[str, dict[Any, list[metrics.Interval]]] = {}
        for s in settings:
            if option in s.point:
                lines.setdefault(s.objective, {}).setdefault(s.point[option], []).append(s.interval)
        if any(len(points) > 1 for points in lines.values()):
            svgs.append(plots.sweep_curves(lines, values, f"{figure} by {option}"))
    judged = [
        (s.objective, f"{spread(interval_of(s.judged, metric))} %, {_judged_on(s.judged[0].results)}")
        for s in settings
        if s.judged
    ]
    note = (
        "Percent, mean over seeds ± half of the 95 % interval. Bold is what was chosen, the largest mean of "
    )
    note += "each objective, which chance may have put ahead of the others."
    joined = "Lines join the best of each value; dots are all settings. Bars are 95 % intervals."
    sections = [
        Section("Settings", table=table, note=note),
        Section("What was chosen, on a split that chose nothing", said=judged) if judged else None,
        Section("By option", figures=[(svg, ()) for svg in svgs], note=joined) if svgs else None,
    ]
    lead = f"{len(settings)} settings of {', '.join(names)}, chosen by {figure.lower()}."
    own = own_values({s.objective: s.configs[0] for s in settings}, {})
    own = {name: {k: v for k, v in of.items() if k not in grid} for name, of in own.items()}
    _write(path, config, "Sweep", lead, sections, settings[0].records[0].results, {"grid": grid} | own)


def own_values(
    configs: Mapping[str, TrainConfig], given: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What objectives do not share: by objective, its loss's options, where they are set, and its values of
    all others that were ``given`` to one of them alone."""
    others = dict.fromkeys(option for of in given.values() for option in of if option not in LOSS_OPTIONS)
    values = {}
    for objective, config in configs.items():
        of_loss = [n for n in LOSS_OPTIONS if n in OBJECTIVES[objective].options]
        of_loss = [n for n in of_loss if getattr(config, n) is not None]
        values[objective] = {n: getattr(config, n) for n in [*of_loss, *others]}
    return values


def _write(
    path: Path,
    config: TrainConfig,
    what: str,
    lead: str,
    sections: Sequence[Section | None],
    results: Mapping[str, Any],
    own: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """A page with the options of a run, and the versions that made its ``results``; or, where some options
    are ``own`` to an objective, those that all share, and those own ones."""
    hidden = {*OF_ONE_RUN, *LOSS_OPTIONS, *(option for of in own.values() for option in of)} if own else ()
    options = {k: v for k, v in config.to_dict().items() if k not in hidden}
    setting = [str(options["model"])] if "model" in options else []
    if options.get("shots"):
        setting.append(f"{config.shots} training images of each class")
    if "batch_size" in options:
        balanced = f", {config.images_per_class} of a class" if config.images_per_class else ""
        setting.append(f"batches of {config.batch_size} images{balanced}")
    comments = {n: ", ".join(f"{k} {v}" for k, v in of.items()) for n, of in (own or {}).items() if of}
    comments |= {name: results[name] for name in versions() if name in results}
    comments = "".join(f"# {name} {text}\n" for name, text in comments.items())
    write_page(
        path,
        sections,
        title=f"{what} on {Path(config.data).name if config.data_is_folder else config.data}",
        lead=lead,
        setting="; ".join(setting) + "." * bool(setting),
        options_title="Options of the run" if own is None else "Options shared by the runs",
        options=yaml.safe_dump(options, sort_keys=False) + comments,
    )


def _judged_on(results: Mapping[str, Any]) -> str:
    return f"{results['images']} images of the {results['split']} split"


# Sections of accuracy


def with_untouched(runs: Runs) -> Runs:
    """All objectives start from the same backbones, one per seed: those of the first one stand for all."""
    untouched = untouched_records(next(iter(runs.values())))
    return ({UNTOUCHED: untouched} if untouched else {}) | dict(runs)


def accuracy_columns(runs: Runs) -> dict[str, str]:
    """Those that all runs have."""
    return {k: v for k, v in ACCURACIES.items() if all(k in r.results for of in runs.values() for r in of)}


def _accuracies(runs: Runs) -> Section:
    columns, shown = accuracy_columns(runs), with_untouched(runs)
    compared = _compared(shown, columns)
    best = {d.figure: d.objective for d in compared}
    best |= {d.figure: "" for d in compared if d.verdict != "above"}  # chance may have put it ahead
    rows = {
        name: [cell(spread(interval_of(records, c)), bold=best.get(c) == name) for c in columns]
        for name, records in shown.items()
    }
    note = "Percent. "
    if max(map(len, runs.values())) > 1:
        note = (
            "Percent, mean over seeds ± half of the 95 % interval (Student's t). Bold is ahead of all others "
            f"(p < {SIGNIFICANT} of each paired difference, with Holm's correction for {len(compared)} "
            "comparisons); where nothing is bold, nothing is. "
        )
    note += (
        "Top-k is the trained classifier's. Neighbours (20, weighed by similarity), centroid (nearest class "
        "mean) and probe (logistic regression) look only at the frozen embeddings, with the training images "
        "as references."
    )
    if UNTOUCHED in shown:
        note += " Untouched is the given backbone before the first step."
    return Section("Accuracy", table=table_of(rows, columns.values()), note=note)


def _compared(shown: Runs, columns: Iterable[str]) -> list[Difference]:
    """In each column, who has the best mean against every other, corrected together."""
    found = []
    for column in columns:
        having = {n: records for n, records in shown.items() if all(column in r.results for r in records)}
        best = max(having, key=lambda name: interval_of(having[name], column).mean)
        found += [difference(having[best], of, column) for name, of in having.items() if name != best]
    return corrected(found)


def _differences(differences: Sequence[Difference]) -> Section | None:
    """A figure for each column and reference, a line in it per objective, and what it says in words."""
    groups: dict[str, list[Difference]] = {}
    for d in differences:
        groups.setdefault(f"{ACCURACIES[d.figure]} against {d.reference}, paired", []).append(d)
    figures = []
    for title, group in groups.items():
        rows = [(d.objective, 100 * np.array(d.by_seed), 100 * d.mean, 100 * d.half_width) for d in group]
        figures.append((plots.differences(rows, title), [(d.objective, _verdict(d)) for d in group]))
    images = {d.images for d in differences}
    what = (
        "of the seeds, not that of the images"
        if None in images
        else f"of seeds and of images ({', '.join(map(str, sorted(images)))}), both drawn anew"
    )
    note = (
        "Small dots are seeds: the same subset and the same order of images for both sides. Bars are 95 % "
        f"intervals of each mean difference alone, and hold the variation {what}. Above and below are said "
        f"where p < {SIGNIFICANT} with Holm's correction for the {len(differences)} comparisons here."
    )
    return Section("Paired differences", figures=figures, note=note) if figures else None


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
    said = "; ".join(f"{', '.join(of)} {verdict} {baseline}" for verdict, of in names.items())
    return f" {ACCURACIES[figure]}: {said}." if said else ""


def _classes(val: Outputs, classes: Sequence[str]) -> Section:
    """The worst, and of few classes which is taken for which."""
    rows = val.by_class(classes)
    worst = sorted(rows, key=lambda row: row["accuracy"])[:_CLASSES]
    table = [["Class", "Top-1", "Images", "Most often taken for"]]
    for row in worst:
        taken = f"{row['taken_for']} ({row['times']})" if row["times"] else "–"
        table.append([row["class"], f"{100 * row['accuracy']:.1f}", str(row["images"]), taken])
    which = (
        f"The {len(worst)} of {len(rows)} classes that are found least often."
        if len(worst) < len(rows)
        else "Those that are found least often first."
    )
    figures = []
    if len(classes) <= _CONFUSED:
        counts = confusion_matrix(val.labels, val.top[:, 0], labels=range(len(classes)))
        figures.append((plots.confusion(counts, classes), ()))
    return Section("Classes", which, table=table, figures=figures)


def _classes_by_objective(runs: Runs, classes: Sequence[str]) -> Section | None:
    """Mean over seeds, of the classes that are hardest for all together."""
    records = [record for of in runs.values() for record in of]
    if any(r.labels is None or len(r.correct.get("top1", ())) != len(r.labels) for r in records):
        return None
    present = np.unique(records[0].labels)

    def by_class(record: RunRecord) -> list[float]:
        return [record.correct["top1"][record.labels == c].mean() for c in present]

    accuracy = np.array([np.mean([by_class(record) for record in of], axis=0) for of in runs.values()])
    order = np.argsort(accuracy.mean(axis=0))[:_CLASSES]
    table = [["Class", *runs]]
    table += [[classes[present[i]], *(f"{100 * value:.1f}" for value in accuracy[:, i])] for i in order]
    text = "Top-1 in percent, mean over seeds"
    if len(order) < len(present):
        text += f", of the {len(order)} of {len(present)} classes that are hardest for all together"
    return Section("Classes", f"{text}.", table=table)


# Sections of photographs


def _mistakes(val: Outputs, images: Images, classes: Sequence[str]) -> Section | None:
    wrong = (~val.correct()).nonzero()[:, 0]
    worst = wrong[val.confidence[wrong, 0].argsort(descending=True, stable=True)][:_MISTAKES].tolist()
    photos = [
        (
            [_photograph(images, val, i)],
            f"{classes[val.top[i, 0]]}, {100 * val.confidence[i, 0]:.0f} %; it is {classes[val.labels[i]]}",
        )
        for i in worst
    ]
    text = "Wrong, and surest of it: what the classifier says, how sure it is, and what it is."
    return Section("Worst mistakes", text, photos=photos) if photos else None


def _hardest(val: Outputs, images: Images, classes: Sequence[str]) -> Section | None:
    photos = [
        (
            [_photograph(images, val, i), _photograph(images, val, j)],
            f"{classes[val.labels[i]]} and {classes[val.labels[j]]}, cosine {cosine:.3f}",
        )
        for i, j, cosine in metrics.hardest_pairs(val.embeddings.numpy(), val.labels.numpy(), _PAIRS)
    ]
    text = "Images of different classes whose embeddings are most alike."
    return Section("Hardest negatives", text, photos=photos) if photos else None


def _photograph(images: Images, val: Outputs, i: int) -> str:
    return plots.photograph(images.decode(int(images.indices[val.rows[i]])))


# Sections of curves, embeddings and cost


def _curves(runs: Runs, columns: Mapping[str, str]) -> Section:
    """Of ``columns`` of metrics.csv, with their titles."""
    figures = []
    for column, title in columns.items():
        scale, unit = (1.0, "nats") if column in _LOSSES else (100.0, "%")
        curves = {name: [_curve(r, column, scale) for r in records] for name, records in runs.items()}
        curves = {name: of for name, of in curves.items() if all(len(epochs) for epochs, _ in of)}
        if curves:
            figures.append((plots.learning_curves(curves, title, unit), ()))
    return Section(
        "Learning curves",
        figures=figures,
        note="Accuracy per epoch on the split that training watches: val, or test where there is no val. "
        "Thin lines are seeds. Objectives of two stages have a classifier only in the second one.",
    )


def _curve(record: RunRecord, column: str, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(epochs counted through the stages, values) where the column has a value."""
    points = [(i, scale * row[column]) for i, row in enumerate(record.rows, 1) if row.get(column) is not None]
    epochs, values = np.array(points, dtype=float).reshape(-1, 2).T
    return epochs, values


def _embeddings(runs: Runs, classes: Sequence[str]) -> list[Section]:
    shown = {name: _shown(records[0]) for name, records in runs.items() if records[0].embeddings is not None}
    if not shown:
        return []
    maps = []
    for name, (x, labels) in shown.items():
        points, method = map_points(x)
        maps.append((plots.embedding_map(points, labels, classes, name), ()))
    cosines = {name: metrics.pair_cosines(x, labels) for name, (x, labels) in shown.items()}
    low = min([0.9, *(of.min() for kinds in cosines.values() for of in kinds if len(of))])
    histograms = [(plots.cosine_histogram(*kinds, name, low), ()) for name, kinds in cosines.items()]
    rows = {name: [cell(spread(interval_of(of, c), 1, 3)) for c in GEOMETRY] for name, of in runs.items()}
    seed = next(iter(runs.values()))[0].seed
    return [
        Section(
            "Embeddings",
            f"{len(labels)} of the images judged on, seed {seed}, {method} of the normalised embeddings. "
            "Only neighbourhoods mean something on such a map; distances across it do not.",
            figures=maps,
        ),
        Section(
            "Cosines within and between classes",
            "The further apart the two, the easier it is to tell classes by the embedding alone.",
            figures=histograms,
        ),
        Section(
            "Retrieval and geometry",
            table=table_of(rows, GEOMETRY.values()),
            note="Among the images judged on. Recall@K: one of the K nearest others is of the same class. "
            "MAP@R: Musgrave et al., arXiv 2003.08505. Silhouette by cosine distance, in [-1, 1]. Alignment: "
            "mean squared distance within a class. Uniformity: log mean exp(-2 · squared distance) over all "
            "pairs (both: Wang & Isola, arXiv 2005.10242). Isotropy: smallest over largest partition "
            "function along the principal directions (Mu & Viswanath, arXiv 1702.01417), 1 is isotropic. "
            "Embeddings normalised.",
        ),
    ]


def _shown(record: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings, labels) of as many images as maps and histograms show."""
    count = len(record.labels)
    chosen = np.sort(np.random.default_rng(0).choice(count, min(count, _SHOWN), replace=False))
    return record.embeddings[chosen], record.labels[chosen]


def map_points(x: np.ndarray) -> tuple[np.ndarray, str]:
    """(points [n, 2], name of the method): t-SNE, or PCA of fewer than 30 images."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    x = metrics.normalized(x)
    if len(x) < 30:
        return PCA(2, random_state=0).fit_transform(x), "principal components"
    x = PCA(min(50, *x.shape), random_state=0).fit_transform(x)
    tsne = TSNE(2, init="pca", perplexity=min(30, len(x) // 4), max_iter=500, random_state=0)
    return tsne.fit_transform(x), "t-SNE"


def _cost(runs: Runs) -> Section:
    machines = {(r.results.get("device"), r.results.get("processes")) for of in runs.values() for r in of}
    if len(machines) > 1:
        text = "Time per epoch is not shown: not all runs had the same device and number of processes."
        return Section("Cost", text)
    if not all(is_steady([record.rows for record in records]) for records in runs.values()):
        return Section(
            "Cost",
            "Time per epoch is not shown: epochs of the same stage took unlike times, so that something else "
            "must have kept the machine busy, or they are too few to tell.",
        )
    rows = {name: [cell(spread(interval_of(of, "seconds_per_epoch"), 1, 2))] for name, of in runs.items()}
    return Section(
        "Cost",
        table=table_of(rows, ["Seconds per epoch"]),
        note="Forward, backward and data loading on the machine of these runs, without evaluation. Two views "
        "double the images; a frozen backbone in the head stage makes its epochs cheap. Epochs of the same "
        f"stage took the same time within {round(100 * (_STEADY - 1))} %.",
    )


def is_steady(runs: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
    """Whether the epochs of each stage took the same time, within a run and from one seed's to another's; the
    first of each run aside, which warms up."""
    stages: dict[str, list[float]] = {}
    for row in (row for rows in runs for row in rows[1:]):
        stages.setdefault(row["stage"], []).append(row["seconds"])
    return bool(stages) and all(
        len(times) > 1 and max(times) <= _STEADY * min(times) for times in stages.values()
    )
