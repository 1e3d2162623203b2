"""Rows of measurements: on the screen, in CSV and JSON, and as a plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from bench.competitors import COMPETITORS

META = (
    "date", "commit", "device", "device_name", "threads", "cores", "torch", "python", "clce_ext",
    "cpu_capability", "blas", "cuda", "cuda_archs", "tf32", "load",
)  # fmt: skip
CASE = ("problem", "dtype", "batch", "dim", "beta", "temperature", "summation", "per_class", "seed")
RESULT = (
    "competitor", "mode", "launch", "status", "rounds", "inner", "median_s", "min_s", "q25_s", "q75_s",
    "gflops", "ratio_mm", "ratio_mm_of_min", "peak_extra_bytes", "saved_bytes", "loss_error", "grad_error",
    "note",
)  # fmt: skip
COLUMNS = META + CASE + RESULT
"""``competitor`` "mm" is the yardstick torch.mm(x, x.T). ``mode``: forward (without a graph), backward, full
(forward and backward of a training step), mm, memory. ``launch``: stream, or graph (replay of a CUDA graph).
``gflops``: effective, 2 B^2 D forward and 4 B^2 D backward over the median. ``ratio_mm``: median over the
rounds of the time over the yardstick's in the same round. ``status``: ok, skipped or failed, with a note."""

LABELS = {name: competitor.title for name, competitor in COMPETITORS.items()} | {"mm": "torch.mm(x, x.T)"}
_MM_COLOR = "#666666"

_INTEGERS = ("threads", "cores", "batch", "dim", "per_class", "seed", "rounds", "inner", "peak_extra_bytes",
             "saved_bytes")  # fmt: skip
_FLOATS = ("beta", "temperature", "median_s", "min_s", "q25_s", "q75_s", "gflops", "ratio_mm",
           "ratio_mm_of_min", "loss_error", "grad_error", "load")  # fmt: skip


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(path: Path) -> list[dict]:
    """Rows with numbers as numbers; an empty cell is None."""
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = set(COLUMNS) - set(rows[0] if rows else COLUMNS)
    if missing:
        raise ValueError(f"{path} is not a results file of this benchmark: no column {sorted(missing)}")
    for row in rows:
        for name in COLUMNS:
            if row[name] == "":
                row[name] = None
            elif name in _INTEGERS:
                row[name] = int(row[name])
            elif name in _FLOATS:
                row[name] = float(row[name])
    return rows


def write_json(path: Path, rows: list[dict]) -> None:
    meta = {name: rows[0][name] for name in META} if rows else {}
    results = [{name: row.get(name) for name in CASE + RESULT} for row in rows]
    path.write_text(json.dumps({"run": meta, "results": results}, indent=1) + "\n")


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def size(value: int | None) -> str:
    if value is None:
        return ""
    value = max(0, value)
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value} B"


def ratio(value: float) -> str:
    return f"{value:.0f}×" if value >= 100 else f"{value:.3g}×"


def speed(gflops: float | None) -> str:
    if gflops is None:
        return ""
    return f"{gflops / 1e3:.3g} TFLOP/s" if gflops >= 1e3 else f"{gflops:.3g} GFLOP/s"


def _cells(row: dict) -> list[str]:
    mode = row["mode"] + (" (graph)" if row.get("launch") == "graph" else "")
    if row["status"] != "ok":
        return [LABELS[row["competitor"]], mode, row["status"], "", "", "", row["note"]]
    if row["mode"] == "memory":
        note = f"peak {size(row['peak_extra_bytes'])}"
        if row.get("saved_bytes") is not None:
            note += f", saved for backward {size(row['saved_bytes'])}"
        return [LABELS[row["competitor"]], mode, "", "", "", "", note]
    half = (row["q75_s"] - row["q25_s"]) / 2 / row["median_s"]
    return [
        LABELS[row["competitor"]], mode, seconds(row["median_s"]), f"±{half:.0%}", speed(row["gflops"]),
        f"{row['ratio_mm']:.2f}", row.get("note") or "",
    ]  # fmt: skip


_HEAD = ["competitor", "mode", "median", "spread", "effective", "over mm", ""]


def print_case(title: str, rows: list[dict]) -> None:
    """One case's table; with rich where it is installed."""
    table = [_cells(row) for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"\n{title}")
        for cells in [_HEAD, *table]:
            print(
                "  " + "  ".join(f"{cell:<22}" if k == 0 else f"{cell:>14}" for k, cell in enumerate(cells))
            )
        return
    shown = Table(title=title, title_justify="left")
    for k, name in enumerate(_HEAD):
        shown.add_column(name, justify="right" if 2 <= k <= 5 else "left", no_wrap=k < 6)
    for row, cells in zip(rows, table, strict=True):
        shown.add_row(*cells, style="bold" if row["competitor"] == "ours" else "")
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    console.print(shown)


def _ok(rows: list[dict], mode: str) -> list[dict]:
    return [
        row for row in rows if row["mode"] == mode and row["status"] == "ok" and row["launch"] == "stream"
    ]


def plot(rows: list[dict], stem: Path) -> list[Path]:
    """STEM.png and STEM.svg: forward and backward over torch.mm by B, a panel for each D; and memory by B.

    Of several problems, dtypes or betas the most measured one is shown. Nothing to show: no files.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    def setting(row: dict) -> tuple:
        return row["problem"], row["dtype"], row["beta"], row["temperature"]

    timed, remembered = _ok(rows, "full"), _ok(rows, "memory")
    settings = [setting(row) for row in timed or remembered]
    if not settings:
        return []
    chosen = max(sorted(set(settings)), key=settings.count)
    timed = [row for row in timed if setting(row) == chosen]
    remembered = [row for row in remembered if setting(row) == chosen]
    dims = sorted({row["dim"] for row in timed})
    memory_dims = [row["dim"] for row in remembered]
    panels = len(dims) + bool(remembered)
    figure, axes = plt.subplots(1, panels, figsize=(4.2 * panels, 3.8), squeeze=False, layout="constrained")

    def lines(axis, points: list[dict], value: str, base: int) -> None:
        for name in COMPETITORS:
            xy = sorted((row["batch"], row[value]) for row in points if row["competitor"] == name)
            if xy:
                look = COMPETITORS[name]
                axis.plot(
                    *zip(*xy, strict=True), marker=look.marker, color=look.color, label=look.title,
                    linewidth=2.6 if name == "ours" else 1.5, markersize=6, zorder=3 if name == "ours" else 2,
                )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=base)
        batches = sorted({row["batch"] for row in points})
        axis.set_xticks(batches, [str(b) for b in batches], rotation=30 if len(batches) > 4 else 0)
        axis.set_xlabel("batch size B")
        axis.grid(True, which="major", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)

    for axis, dim in zip(axes[0], dims, strict=False):
        lines(axis, [row for row in timed if row["dim"] == dim], "ratio_mm", base=10)
        axis.axhline(1, color=_MM_COLOR, linestyle=":", linewidth=1)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
        axis.set_title(f"forward + backward, D = {dim}")
    if dims:
        axes[0][0].set_ylabel("time / torch.mm(x, x.T)")
    if remembered:
        axis, dim = axes[0][-1], max(sorted(set(memory_dims)), key=memory_dims.count)
        lines(axis, [row for row in remembered if row["dim"] == dim], "peak_extra_bytes", base=2)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: size(int(v))))
        axis.set_title(f"peak extra memory, D = {dim}")
    named: dict[str, object] = {}
    for axis in axes[0]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), frameon=False)
    first = rows[0]
    where = first["device_name"]
    if first["device"] == "cpu":
        where += f", {first['threads']} threads"
    problem, dtype, beta, temperature = chosen
    figure.suptitle(
        f"{where}; {dtype}, β = {beta:g}, τ = {temperature:g}"
        + (", against keys" if problem == "clip" else ""),
        fontsize=10,
    )
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    for path in paths:
        # Without dates and random ids the same results give the same files.
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths
