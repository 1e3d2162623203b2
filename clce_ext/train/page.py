"""A page of headings, tables, figures and photographs: what templates/report.html is filled with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from .checkpoint import write_text
from .metrics import Interval, confidence_interval
from .plots import color
from .results import RunRecord

Table = Sequence[Sequence[str]]  # its head is the first row; cells are text, or markup of `cell`
Said = Sequence[tuple[str, str]]  # (name, text)


@dataclass
class Section:
    """A heading and what follows it, in the order of the fields; all text is escaped by the template."""

    title: str
    text: str = ""
    table: Table = ()
    figures: Sequence[tuple[str, Said]] = ()  # SVG, and what is said of it
    said: Said = ()
    photos: Sequence[tuple[Sequence[str], str]] = ()  # data addresses of images, and a text
    links: Said = ()  # (name, address)
    note: str = ""


def write_page(path: Path, sections: Sequence[Section | None], **texts: str) -> None:
    """``texts``: title, lead and, where wanted, setting, options_title and options."""
    environment = Environment(loader=PackageLoader("clce_ext.train"), autoescape=True, trim_blocks=True)
    page = environment.get_template("report.html")
    write_text(path, page.render(sections=[s for s in sections if s is not None], **texts) + "\n")


def interval_of(records: Sequence[RunRecord], column: str) -> Interval:
    return confidence_interval(np.array([r.results.get(column, math.nan) for r in records]))


def spread(interval: Interval, scale: float = 100.0, digits: int = 1) -> str:
    """The mean and half of the 95 % interval, by default in percent: ``91.2 ± 0.3``."""
    if not math.isfinite(interval.mean):
        return "n/a"
    half = f" ± {scale * interval.half_width:.{digits}f}" if math.isfinite(interval.half_width) else ""
    return f"{scale * interval.mean:.{digits}f}{half}"


def cell(text: str, bold: bool = False) -> Markup:
    """Of what `spread` gives, with the interval small."""
    mean, plus_minus, half = text.partition(" ± ")
    shown = Markup("<b>{}</b>" if bold else "{}").format(mean)
    return shown + Markup(" <small>± {}</small>").format(half) if plus_minus else shown


def name_cell(objective: str) -> Markup:
    return Markup('<span class=dot style="background:{}"></span>{}').format(color(objective), objective)


def table_of(rows: Mapping[str, Sequence[str]], columns: Sequence[str]) -> Table:
    """A row per objective."""
    return [["", *columns], *([name_cell(name), *cells] for name, cells in rows.items())]
