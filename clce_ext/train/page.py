"""Fills templates/report.html: its words stand there, and what it shows comes from here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from .checkpoint import write_text
from .plots import color

Table = Sequence[Sequence[str]]  # its head is the first row
Photos = Sequence[tuple[Sequence[str], str]]  # data addresses of images, and a text


def write_page(path: Path, **shown: Any) -> None:
    """A page of ``title``, ``lead`` and those sections that ``shown`` has something for; text is escaped."""
    environment = Environment(loader=PackageLoader("clce_ext.train"), autoescape=True, trim_blocks=True)
    write_text(path, environment.get_template("report.html").render(shown) + "\n")


def cell(text: str, bold: bool = False) -> Markup:
    """Of what Interval.text gives, with the interval small."""
    mean, plus_minus, half = text.partition(" ± ")
    shown = Markup("<b>{}</b>" if bold else "{}").format(mean)
    return shown + Markup(" <small>± {}</small>").format(half) if plus_minus else shown


def name_cell(objective: str) -> Markup:
    return Markup('<span class=dot style="background:{}"></span>{}').format(color(objective), objective)


def table_of(rows: Mapping[str, Sequence[str]], columns: Iterable[str]) -> Table:
    """A row per objective."""
    return [["", *columns], *([name_cell(name), *cells] for name, cells in rows.items())]
