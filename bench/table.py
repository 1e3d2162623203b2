"""``python -m bench.table RESULTS.csv``: a results file as Markdown.

``--into FILES`` puts its tables between the lines ``<!-- bench NAME -->`` and ``<!-- /bench -->`` of those
files, NAME being the results file's, and its picture with the largest batch between
``<!-- bench-summary NAME -->`` and ``<!-- /bench -->``; ``--check`` only says whether they are already what
they should be. ``--plot`` draws the picture, RESULTS.svg, anew.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from bench.report import LABELS, plot, ratio, read_csv, seconds, size, speed


def _table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _setting(row: dict) -> tuple:
    return row["problem"], row["dtype"], row["beta"], row["temperature"], row["launch"]


def _title(setting: tuple) -> str:
    problem, dtype, beta, temperature, launch = setting
    what = "the batch against itself" if problem == "self" else "against keys (one half of CLIP)"
    graph = ", replayed as a CUDA graph" if launch == "graph" else ""
    return f"{what}, {dtype}, β = {beta:g}, τ = {temperature:g}{graph}"


def _order(rows: list[dict]) -> list[str]:
    present = {row["competitor"] for row in rows if row["status"] == "ok"}
    return [name for name in LABELS if name in present and name != "mm"]


def _time_cell(row: dict | None, bold: bool) -> str:
    if row is None or row["status"] != "ok":
        return "–"
    cell = f"{seconds(row['median_s'])} ({ratio(row['ratio_mm'])})"
    return f"**{cell}**" if bold else cell


def _times(rows: list[dict], setting: tuple, mode: str) -> str:
    rows = [row for row in rows if _setting(row) == setting or row["mode"] == "mm"]
    mode_rows = [row for row in rows if row["mode"] == mode and _setting(row) == setting]
    names = _order(mode_rows)
    yardsticks = {
        (row["dim"], row["batch"]): row
        for row in rows
        if row["mode"] == "mm" and _setting(row)[:4] == setting[:4]
    }
    body = []
    for dim, batch in sorted({(row["dim"], row["batch"]) for row in mode_rows}):
        of = {row["competitor"]: row for row in mode_rows if (row["dim"], row["batch"]) == (dim, batch)}
        ours = of.get("ours")
        effective = speed(ours["gflops"]) if ours is not None and ours["status"] == "ok" else "–"
        body.append(
            [str(dim), str(batch), seconds(yardsticks[dim, batch]["median_s"])]
            + [_time_cell(of.get(name), name == "ours") for name in names]
            + [effective]
        )
    return _table(["D", "B", LABELS["mm"], *(LABELS[name] for name in names), "clce_ext, effective"], body)


def _memory(rows: list[dict]) -> str:
    names = _order(rows)
    body = []
    for dim, batch in sorted({(row["dim"], row["batch"]) for row in rows}):
        of = {row["competitor"]: row for row in rows if (row["dim"], row["batch"]) == (dim, batch)}
        cells = []
        for name in names:
            row = of.get(name)
            if row is None or row["status"] != "ok":
                cells.append("–")
                continue
            cell = size(row["peak_extra_bytes"])
            cells.append(f"**{cell}**" if name == "ours" else cell)
        matrix = size(4 * batch * batch)
        body.append([str(dim), str(batch), *cells, matrix])
    return _table(["D", "B", *(LABELS[name] for name in names), "one B×B of float32"], body)


NAMES = {"full": "Forward and backward", "forward": "Forward alone", "backward": "Backward alone"}


def _head(first: dict, path: Path, base: Path) -> str:
    where = first["device_name"] + (f", {first['threads']} threads" if first["device"] == "cpu" else "")
    link = f"[{path.name}]({_link(path, base)})"
    return f"{where}; torch {first['torch']}; {first['date'][:10]}, commit {first['commit']} ({link})."


def _link(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path, base)).as_posix()


def _picture(path: Path, base: Path) -> str:
    return f"![Time over torch.mm, and memory, by batch size]({_link(path.with_suffix('.svg'), base)})"


def render(path: Path, modes: tuple[str, ...] = ("full", "memory"), base: Path = Path()) -> str:
    """The results of a run, in Markdown: where and when, times of the modes, memory, the plot if any.

    ``base`` is the folder that links start from.
    """
    rows = read_csv(path)
    head = _head(rows[0], path, base)
    rounds = [row["rounds"] for row in rows if row["rounds"]]
    if rounds:
        fewest, most = min(rounds), max(rounds)
        count = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        head += (
            f" Medians of {count} interleaved rounds in one run; "
            "in brackets the time over that of `torch.mm(x, x.T)` in the same round."
        )
    parts = [head]
    for mode, name in NAMES.items():
        if mode not in modes:
            continue
        timed = [row for row in rows if row["mode"] == mode and row["competitor"] != "mm"]
        for setting in dict.fromkeys(_setting(row) for row in timed if row["status"] == "ok"):
            parts.append(f"{name}, {_title(setting)}:")
            parts.append(_times(rows, setting, mode))
    remembered = [row for row in rows if row["mode"] == "memory" and "memory" in modes]
    for setting in dict.fromkeys(_setting(row) for row in remembered if row["status"] == "ok"):
        parts.append(f"Peak memory of forward and backward beyond the inputs, {_title(setting)}:")
        parts.append(_memory([row for row in remembered if _setting(row) == setting]))
    if path.with_suffix(".svg").exists():
        parts.append(_picture(path, base))
    return "\n\n".join(parts) + "\n"


def summary(path: Path, base: Path = Path()) -> str:
    """The plot, and the times and the memory of the largest batch that is timed."""
    rows = [row for row in read_csv(path) if row["status"] == "ok" and row["competitor"] != "mm"]
    setting = _setting(next(row for row in rows if row["mode"] == "full"))
    rows = [row for row in rows if _setting(row) == setting]
    timed = [row for row in rows if row["mode"] == "full"]
    batch = max(row["batch"] for row in timed)
    dim = min(row["dim"] for row in timed if row["batch"] == batch)
    rows = [row for row in rows if (row["batch"], row["dim"]) == (batch, dim)]
    names = _order(rows)
    body = []
    for mode, what, cell in (
        ("full", "forward and backward", lambda row: seconds(row["median_s"])),
        ("memory", "memory beyond the inputs", lambda row: size(row["peak_extra_bytes"])),
    ):
        of = {row["competitor"]: cell(row) for row in rows if row["mode"] == mode}
        if not of:
            continue
        cells = [of.get(name, "–") for name in names]
        body += [[what, *(f"**{c}**" if n == "ours" else c for n, c in zip(names, cells, strict=True))]]
    table = _table([f"B = {batch}, D = {dim}", *(LABELS[name] for name in names)], body)
    title = _title(setting)
    return (
        f"{_picture(path, base)}\n\n{table}\n\n{title[0].upper()}{title[1:]}; {_head(rows[0], path, base)}\n"
    )


def insert(document: str, name: str, text: str, kind: str = "bench") -> str:
    """The document with the text between its markers; ValueError where it has none of that name."""
    pattern = re.compile(rf"(<!-- {kind} {re.escape(name)} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f'no "<!-- {kind} {name} -->" ... "<!-- /bench -->" in the document')
    return pattern.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", document)


def fill(document: str, results: Path, modes: tuple[str, ...], base: Path) -> str:
    """The document with all that it has markers for; ValueError where that is nothing."""
    summarised = f"<!-- bench-summary {results.name} -->" in document
    if summarised:
        document = insert(document, results.name, summary(results, base), "bench-summary")
    if summarised and f"<!-- bench {results.name} -->" not in document:
        return document
    return insert(document, results.name, render(results, modes, base))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--modes", nargs="+", choices=(*NAMES, "memory"), default=["full", "memory"])
    parser.add_argument("--into", type=Path, nargs="+", default=[], help="Markdown files with the markers")
    parser.add_argument(
        "--check", action="store_true", help="with --into: change nothing, exit 1 if it would"
    )
    parser.add_argument("--plot", action="store_true", help="draw the picture beside the results anew")
    args = parser.parse_args(argv)
    modes = tuple(args.modes)
    if args.plot:
        plot(read_csv(args.results), args.results)
    if not args.into:
        print(render(args.results, modes), end="")
    stale = 0
    for page in args.into:
        old = page.read_text()
        new = fill(old, args.results, modes, page.parent)
        if args.check and new != old:
            print(f"{page} does not show {args.results}: run python -m bench.table without --check")
            stale = 1
        elif new != old:
            page.write_text(new)
    return stale


if __name__ == "__main__":
    raise SystemExit(main())
