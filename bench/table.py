"""``python -m bench.table RESULTS.csv``: the README's Markdown tables, from a results file.

``--into README.md`` puts them between the lines ``<!-- bench NAME -->`` and ``<!-- /bench -->`` of that file,
NAME being the results file's; ``--check`` only says whether they are already what they should be.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from bench.report import LABELS, ratio, read_csv, seconds, size, speed


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


def render(path: Path, modes: tuple[str, ...] = ("full", "memory")) -> str:
    """The results of a run, in Markdown: where and when, times of the modes, memory, the plot if any."""
    rows = read_csv(path)
    first = rows[0]
    where = first["device_name"] + (f", {first['threads']} threads" if first["device"] == "cpu" else "")
    path = Path(path)
    head = (
        f"{where}; torch {first['torch']}; {first['date'][:10]}, commit {first['commit']} "
        f"([{path.name}](bench/results/{path.name}))."
    )
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
    picture = path.with_suffix(".svg")
    if picture.exists():
        parts.append(f"![Time over torch.mm, and memory, by batch size](bench/results/{picture.name})")
    return "\n\n".join(parts) + "\n"


def insert(document: str, name: str, tables: str) -> str:
    """The document with the tables between its markers; ValueError where it has none of that name."""
    pattern = re.compile(rf"(<!-- bench {re.escape(name)} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f'no "<!-- bench {name} -->" ... "<!-- /bench -->" in the document')
    return pattern.sub(lambda found: f"{found[1]}\n{tables}\n{found[2]}", document)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--modes", nargs="+", choices=(*NAMES, "memory"), default=["full", "memory"])
    parser.add_argument("--into", type=Path, help="a Markdown file with the markers")
    parser.add_argument(
        "--check", action="store_true", help="with --into: change nothing, exit 1 if it would"
    )
    args = parser.parse_args(argv)
    tables = render(args.results, tuple(args.modes))
    if args.into is None:
        print(tables, end="")
        return 0
    old = args.into.read_text()
    new = insert(old, args.results.name, tables)
    if args.check:
        if new != old:
            print(f"{args.into} does not show {args.results}: run python -m bench.table without --check")
        return int(new != old)
    args.into.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
