"""A page of headings, tables, figures and photographs: what templates/report.html is filled with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from .checkpoint import write_text
from .plots import color

Table = Sequence[Sequence[str]]  # its head is the first row


@dataclass
class Section:
    """A heading and what follows it, in the order of the fields; text that is no Markup gets escaped."""

    title: str
    text: str = ""
    table: Table = ()
    figures: Sequence[Markup] = ()
    photos: Sequence[tuple[Sequence[str], str]] = ()  # data addresses of images, and a text
    note: str = ""


def write_page(path: Path, sections: Iterable[Section | None], **texts: str) -> None:
    """``texts``: title, lead and, where wanted, setting, options_title and options."""
    environment = Environment(loader=PackageLoader("clce_ext.train"), autoescape=True, trim_blocks=True)
    page = environment.get_template("report.html")
    write_text(path, page.render(sections=[s for s in sections if s is not None], **texts) + "\n")


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
