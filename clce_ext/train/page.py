"""A page of headings, tables, figures and photographs: what templates/report.html is filled with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from . import metrics, plots
from .checkpoint import write_text
from .results import RunRecord


@dataclass
class Cell:
    text: str
    half: str = ""  # of its 95 % interval
    bold: bool = False
    color: str = ""  # of a dot before it


@dataclass
class Section:
    """A heading and what follows it, in the order of the fields; all text is escaped by the template."""

    title: str
    text: str = ""
    table: dict[str, Any] | None = None  # head, rows of Cells
    figures: Sequence[dict[str, Any]] = ()  # svg and what is said of it: (name, text)
    said: Sequence[tuple[str, str]] = ()
    photos: Sequence[dict[str, Any]] = ()  # images as data addresses, and text
    links: Sequence[tuple[str, str]] = ()
    note: str = ""


def write_page(path: Path, sections: Sequence[Section | None], **texts: str) -> None:
    """``texts``: title, lead and, where wanted, setting, options_title and options."""
    template = Environment(
        loader=PackageLoader("clce_ext.train"), autoescape=True, trim_blocks=True
    ).get_template("report.html")
    write_text(path, template.render(sections=[s for s in sections if s is not None], **texts) + "\n")


def interval_of(records: Sequence[RunRecord], column: str) -> metrics.Interval:
    return metrics.confidence_interval(np.array([r.results.get(column, math.nan) for r in records]))


def percent(interval: metrics.Interval, bold: bool = False) -> Cell:
    return number_cell(interval, 100, 1, bold)


def number_cell(interval: metrics.Interval, scale: float, digits: int, bold: bool = False) -> Cell:
    if not math.isfinite(interval.mean):
        return Cell("n/a")
    half = f"{scale * interval.half_width:.{digits}f}" if math.isfinite(interval.half_width) else ""
    return Cell(f"{scale * interval.mean:.{digits}f}", half, bold)


def name_cell(objective: str) -> Cell:
    return Cell(objective, color=plots.color(objective))


def drawn(svg: str, said: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    return {"svg": Markup(svg), "said": said}


def table_of(rows: Mapping[str, Sequence[Cell]], columns: Mapping[str, str]) -> dict[str, Any]:
    body = [[name_cell(name), *cells] for name, cells in rows.items()]
    return {"head": ["", *columns.values()], "rows": body}
