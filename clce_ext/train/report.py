"""One HTML file per run, comparison or sweep: no script, no network, readable on a phone.

The functions for its parts give what templates/report.html shows, by the names that it has there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from sklearn.metrics import confusion_matrix
from sklearn.utils import resample

from . import metrics, plots
from .checkpoint import write_text
from .config import TrainConfig
from .data import Images
from .data.sources import is_folder
from .intervals import SIGNIFICANT, Difference, corrected, difference
from .judge import Outputs
from .objectives import LOSS_OPTIONS, OBJECTIVES, UNTOUCHED
from .results import RunRecord, interval_of, untouched_records
from .start import versions

Runs = Mapping[str, Sequence[RunRecord]]  # by objective, in the order of seeds
Table = Sequence[Sequence[str]]  # its head is the first row; cells are text, which gets escaped, or markup
Photos = Sequence[tuple[Sequence[str], str]]  # data addresses of images, and a text

ACCURACIES = {"top1": "Top-1", "top5": "Top-5", "knn": "Neighbours", "centroid": "Centroid", "probe": "Probe"}
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
    tensors = val.embedded() if val is not None else ()
    runs = {config.objective: [RunRecord(config.objective, config.seed, results, rows, *tensors)]}
    shown = _accuracies(runs) | {"curves": _curves(runs, _CURVES | _LOSSES)}
    if val is not None and images is not None:
        shown |= _classes(val, classes) | _photographs(val, images, classes)
    if with_map:
        shown |= _embeddings(runs, classes)
    lead = f"Top-1 {100 * results['top1']:.2f} % on {judged_on(results)} after {results['epochs']} epochs."
    _write(folder / "report.html", config, config.objective, lead, shown, results)


def write_comparison_report(
    path: Path,
    config: TrainConfig,
    runs: Runs,
    classes: Sequence[str],
    baseline: str,
    differences: Sequence[Difference],
    own: Mapping[str, Mapping[str, Any]],
) -> None:
    """Objectives x seeds, the same seeds everywhere; ``own`` are options of one objective alone."""
    records = [record for of in runs.values() for record in of]
    names = {f"{r.objective}, seed {r.seed}": f"runs/{r.objective}-seed{r.seed}/report.html" for r in records}
    shown = _accuracies(runs) | _differences(differences) | _classes_by_objective(runs, classes)
    shown |= _embeddings(runs, classes) | {"curves": _curves(runs, _CURVES), "links": names, **_cost(runs)}
    first, seeds = records[0].results, shown["seeds"]
    lead = (
        f"{len(runs)} objectives, {seeds} seed{'s' * (seeds > 1)}, "
        f"{max(r.results['epochs'] for r in records)} epochs each on {first['train_images']} "
        f"training images; judged on {judged_on(first)}."
        f"{_standing(differences, baseline, 'top1')}{_standing(differences, baseline, 'knn')}"
    )
    _write(path, config, " · ".join(runs), lead, shown, first, own, LOSS_OPTIONS)


def write_sweep_report(
    path: Path,
    config: TrainConfig,
    settings: Sequence[Mapping[str, Any]],
    grid: Mapping[str, Sequence[Any]],
    figure: str,
    columns: Mapping[tuple[str, str], str],
    results: Mapping[str, Any],
) -> None:
    """A table of the ``settings``, the rows of sweep.csv, and, per option of the grid, how the figure follows
    it. ``columns`` are the figure's mean and half width in these rows, on the split that chose and perhaps on
    another one, with what it was judged on; ``results`` are those of one run."""
    mean, half = next(iter(columns))
    objectives = list(dict.fromkeys(s["objective"] for s in settings))
    table = [["", *grid, *(f"{figure}, {images}" for images in columns.values())]]
    for s in sorted(settings, key=lambda s: (objectives.index(s["objective"]), -s[mean])):
        cells = [str(s.get(option, "–")) for option in grid]
        for column in columns:
            found = metrics.Interval(*map(s.get, column), s["seeds"]) if column[0] in s else None
            cells.append(_cell(found.text(), bold=s["chosen"]) if found else "–")
        table.append([_name(s["objective"]), *cells])
    figures = []
    for option, values in grid.items():
        points: dict[str, list[tuple[int, float, float]]] = {}
        for s in (s for s in settings if option in s):
            point = values.index(s[option]), 100 * s[mean], 100 * s[half]
            points.setdefault(s["objective"], []).append(point)
        if any(len({place for place, *_ in of}) > 1 for of in points.values()):
            figures.append(plots.sweep_curves(points, values, f"{figure} by {option}"))
    lead = f"{len(settings)} settings of {', '.join(objectives)}, chosen by {figure.lower()}."
    _write(path, config, "Sweep", lead, {"settings": table, "by_option": figures}, results, {"grid": grid})


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
    shown: Mapping[str, Any],
    results: Mapping[str, Any],
    own: Mapping[str, Mapping[str, Any]] | None = None,
    unshared: Sequence[str] = (),
) -> None:
    """A page with the options of a run, and the versions that made its ``results``; or, where some options
    are ``own`` to an objective, those that all share (never ``unshared`` ones), and those own ones."""
    varied = {option for of in (own or {}).values() for option in of}
    hidden = () if own is None else {*OF_ONE_RUN, *unshared, *varied}
    options = {k: v for k, v in config.to_dict().items() if k not in hidden}
    balanced = f", {config.images_per_class} of a class" if config.images_per_class else ""
    setting = {
        "model": config.model,
        "shots": config.shots and f"{config.shots} training images of each class",
        "batch_size": f"batches of {config.batch_size} images{balanced}",
    }
    comments = {n: ", ".join(f"{k} {v}" for k, v in of.items()) for n, of in (own or {}).items() if of}
    comments |= {name: results[name] for name in versions() if name in results}
    comments = "".join(f"# {name} {text}\n" for name, text in comments.items())
    write_page(
        path,
        title=f"{what} on {Path(config.data).name if is_folder(config.data) else config.data}",
        lead=lead,
        setting="; ".join(text for name, text in setting.items() if text and name in options),
        options_title="Options of the run" if own is None else "Options shared by the runs",
        options=yaml.safe_dump(options, sort_keys=False) + comments,
        **shown,
    )


def write_page(path: Path, **shown: Any) -> None:
    """A page of ``title``, ``lead`` and those parts of templates/report.html that ``shown`` has."""
    environment = Environment(loader=PackageLoader("clce_ext.train"), autoescape=True, trim_blocks=True)
    write_text(path, environment.get_template("report.html").render(shown) + "\n")


def _cell(text: str, bold: bool = False) -> Markup:
    """Of what Interval.text gives, with the interval small."""
    mean, plus_minus, half = text.partition(" ± ")
    shown = Markup("<b>{}</b>" if bold else "{}").format(mean)
    return shown + Markup(" <small>± {}</small>").format(half) if plus_minus else shown


def _name(objective: str) -> Markup:
    style = Markup('<span class=dot style="background:{}"></span>{}')
    return style.format(plots.color(objective), objective)


def _table(rows: Mapping[str, Sequence[str]], columns: Iterable[str]) -> Table:
    """A row per objective."""
    return [["", *columns], *([_name(name), *cells] for name, cells in rows.items())]


def judged_on(results: Mapping[str, Any]) -> str:
    return f"{results['images']} images of the {results['split']} split"


# Accuracy


def with_untouched(runs: Runs) -> Runs:
    """All objectives start from the same backbones, one per seed: those of the first one stand for all."""
    untouched = untouched_records(next(iter(runs.values())))
    return ({UNTOUCHED: untouched} if untouched else {}) | dict(runs)


def accuracy_columns(runs: Runs) -> dict[str, str]:
    """Those that all runs have."""
    return {k: v for k, v in ACCURACIES.items() if all(k in r.results for of in runs.values() for r in of)}


def _accuracies(runs: Runs) -> dict[str, Any]:
    columns, shown = accuracy_columns(runs), with_untouched(runs)
    compared = _compared(shown, columns)
    best = {d.figure: d.objective for d in compared}
    best |= {d.figure: "" for d in compared if d.verdict != "above"}  # chance may have put it ahead
    rows = {
        name: [_cell(interval_of(records, c).text(), bold=best.get(c) == name) for c in columns]
        for name, records in shown.items()
    }
    seeds = max(map(len, runs.values()))
    return {
        "accuracies": _table(rows, columns.values()),
        "seeds": seeds,
        "compared": len(compared),
        "significant": SIGNIFICANT,
        "is_given": UNTOUCHED in shown,
    }


def _compared(shown: Runs, columns: Iterable[str]) -> list[Difference]:
    """In each column, who has the best mean against every other, corrected together."""
    found = []
    for column in columns:
        having = {n: records for n, records in shown.items() if all(column in r.results for r in records)}
        best = max(having, key=lambda name: interval_of(having[name], column).mean)
        found += [difference(having[best], of, column) for name, of in having.items() if name != best]
    return corrected(found)


def _differences(differences: Sequence[Difference]) -> dict[str, Any]:
    """A figure for each column and reference, a line in it per objective, and what it says in words."""
    groups: dict[str, list[Difference]] = {}
    for d in differences:
        groups.setdefault(f"{ACCURACIES[d.figure]} against {d.reference}, paired", []).append(d)
    figures = []
    for title, group in groups.items():
        rows = [(d.objective, 100 * np.array(d.by_seed), 100 * d.mean, 100 * d.half_width) for d in group]
        figures.append((plots.differences(rows, title), [(d.objective, _verdict(d)) for d in group]))
    images = {d.images for d in differences}
    return {
        "differences": figures,
        "comparisons": len(differences),
        "images": "" if None in images else ", ".join(map(str, sorted(images))),
    }


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


def _classes(val: Outputs, classes: Sequence[str]) -> dict[str, Any]:
    """The worst, and of few classes which is taken for which."""
    rows = sorted(val.by_class(classes), key=lambda row: row["accuracy"])
    table = [["Class", "Top-1", "Images", "Most often taken for"]]
    for row in rows[:_CLASSES]:
        taken = f"{row['taken_for']} ({row['times']})" if row["times"] else "–"
        table.append([row["class"], f"{100 * row['accuracy']:.1f}", str(row["images"]), taken])
    shown = {"classes": table, "of_classes": len(rows)}
    if len(classes) <= _CONFUSED:
        counts = confusion_matrix(val.labels, val.top[:, 0], labels=range(len(classes)))
        shown["confusion"] = plots.confusion(counts, classes)
    return shown


def _classes_by_objective(runs: Runs, classes: Sequence[str]) -> dict[str, Any]:
    """Mean over seeds, of the classes that are hardest for all together."""
    records = [record for of in runs.values() for record in of]
    if any(r.labels is None or len(r.correct.get("top1", ())) != len(r.labels) for r in records):
        return {}
    present = np.unique(records[0].labels)

    def by_class(record: RunRecord) -> list[float]:
        return [record.correct["top1"][record.labels == c].mean() for c in present]

    accuracy = np.array([np.mean([by_class(record) for record in of], axis=0) for of in runs.values()])
    order = np.argsort(accuracy.mean(axis=0))[:_CLASSES]
    table = [["Class", *runs]]
    table += [[classes[present[i]], *(f"{100 * value:.1f}" for value in accuracy[:, i])] for i in order]
    return {"classes": table, "of_classes": len(present)}


def _photographs(val: Outputs, images: Images, classes: Sequence[str]) -> dict[str, Photos]:
    """Of what the classifier is wrong about, and of different classes that the model finds alike."""

    def shown(*places: int) -> list[str]:
        return [plots.photograph(images.decode(int(images.indices[val.rows[i]]))) for i in places]

    names = [classes[label] for label in val.labels]
    wrong = (~val.correct()).nonzero()[:, 0]
    surest = wrong[val.confidence[wrong, 0].argsort(descending=True, stable=True)][:_MISTAKES].tolist()
    said = {i: f"{classes[val.top[i, 0]]}, {100 * val.confidence[i, 0]:.0f} %" for i in surest}
    pairs = metrics.hardest_pairs(*val.embedded(), _PAIRS)
    return {
        "mistakes": [(shown(i), f"{text}; it is {names[i]}") for i, text in said.items()],
        "alike": [(shown(i, j), f"{names[i]} and {names[j]}, cosine {c:.3f}") for i, j, c in pairs],
    }


# Curves, embeddings and cost


def _curves(runs: Runs, columns: Mapping[str, str]) -> list[str]:
    """Of ``columns`` of metrics.csv, with their titles."""
    figures = []
    for column, title in columns.items():
        scale, unit = (1.0, "nats") if column in _LOSSES else (100.0, "%")
        curves = {
            name: [scale * np.array([row.get(column, math.nan) for row in r.rows]) for r in records]
            for name, records in runs.items()
        }
        curves = {name: of for name, of in curves.items() if all(np.isfinite(values).any() for values in of)}
        if curves:
            figures.append(plots.learning_curves(curves, title, unit))
    return figures


def _embeddings(runs: Runs, classes: Sequence[str]) -> dict[str, Any]:
    """Maps and cosines of each objective's first seed, and the geometry of all."""
    firsts = {name: records[0] for name, records in runs.items() if records[0].embeddings is not None}
    maps, cosines, shown = [], {}, {}
    for name, record in firsts.items():
        count = min(_SHOWN, len(record.labels))
        drawn = resample(record.embeddings, record.labels, replace=False, n_samples=count, random_state=0)
        points, method = _map_points(drawn[0])
        maps.append(plots.embedding_map(points, drawn[1], classes, name))
        cosines[name] = metrics.pair_cosines(*drawn)
        shown = {"shown": count, "seed": record.seed, "method": method}
    low = min([0.9, *(of.min() for kinds in cosines.values() for of in kinds if len(of))])
    histograms = [plots.cosine_histogram(*kinds, name, low) for name, kinds in cosines.items()]
    rows = {name: [_cell(interval_of(of, c).text(1, 3)) for c in GEOMETRY] for name, of in runs.items()}
    geometry = _table(rows, GEOMETRY.values())
    return shown | {"maps": maps, "histograms": histograms, "geometry": geometry}


def _map_points(x: np.ndarray) -> tuple[np.ndarray, str]:
    """(points [n, 2], name of the method): t-SNE, or PCA of fewer than 30 images."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(x) < 30:
        return PCA(2).fit_transform(metrics.normalized(x)), "principal components"
    tsne = TSNE(2, init="pca", perplexity=min(30, len(x) // 4), max_iter=500, random_state=0)
    return tsne.fit_transform(metrics.normalized(x)), "t-SNE"


def _cost(runs: Runs) -> dict[str, Any]:
    """Nothing to show where something else may have kept the machine busy, or there were several machines."""
    machines = {(r.results.get("device"), r.results.get("processes")) for of in runs.values() for r in of}
    if len(machines) > 1 or not all(_is_steady([r.rows for r in of]) for of in runs.values()):
        return {"cost": [], "machines": len(machines)}
    rows = {name: [_cell(interval_of(of, "seconds_per_epoch").text(1, 2))] for name, of in runs.items()}
    return {"cost": _table(rows, ["Seconds per epoch"]), "steady": round(100 * (_STEADY - 1))}


def _is_steady(runs: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
    """Whether the epochs of each stage took the same time, within a run and from one seed's to another's; the
    first of each run aside, which warms up."""
    stages: dict[str, list[float]] = {}
    for row in (row for rows in runs for row in rows[1:]):
        stages.setdefault(row["stage"], []).append(row["seconds"])
    return bool(stages) and all(len(of) > 1 and max(of) <= _STEADY * min(of) for of in stages.values())
