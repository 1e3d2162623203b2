"""The benchmark command on tiny cases: every competitor, the checks, the reports. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import memory, panel_model, report, table
from bench.cases import Case, copies_to_leave_cache, make_inputs
from bench.check import Checker, Disagreement, step
from bench.competitors import COMPETITORS, Competitor, Yardstick, slab_rows
from bench.run import PRESETS, main

ROOT = Path(__file__).resolve().parent.parent
SELF = Case("cpu", "self", "float32", 48, 20)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two sizes, with and without hardness, every competitor that runs here without a compiler."""
    stem = tmp_path_factory.mktemp("bench") / "tiny"
    code = main(
        [
            *("-B", "32", "40", "-D", "24", "--betas", "1", "0", "--rounds", "3", "--shortest", "0.0001"),
            *("--budget", "5", "--without", "compile", "--modes", "forward", "backward", "full"),
            *("--out", str(stem)),
        ]
    )
    assert code == 0
    return stem, report.read_csv(stem.with_suffix(".csv"))


def test_every_competitor_ran_or_said_why_not(run):
    _, rows = run
    for beta in (0.0, 1.0):
        of = {row["competitor"]: row for row in rows if row["beta"] == beta and row["mode"] in ("full", "mm")}
        assert set(of) == {"mm", *COMPETITORS} - {"compile"}
        for name in ("mm", "ours", "eager", "chunked"):
            assert of[name]["status"] == "ok"
        for name in ("inf-cl", "memeff", "siglip-kernel"):
            assert of[name]["status"] == "skipped" and of[name]["note"] == f"{name} runs on CUDA only"
        if importlib.util.find_spec("pytorch_metric_learning"):
            assert of["metric-learning"]["status"] == ("ok" if beta == 0 else "skipped")


def test_columns(run):
    stem, rows = run
    assert tuple(rows[0]) == report.COLUMNS
    for row in rows:
        assert row["torch"] == torch.__version__ and row["device_name"] and row["commit"]
        if row["status"] != "ok":
            assert row["note"]
            continue
        assert 0 < row["min_s"] <= row["median_s"] and row["rounds"] == 3
        flop = {"mm": 2, "forward": 2, "backward": 4, "full": 6}[row["mode"]] * row["batch"] ** 2 * row["dim"]
        assert row["gflops"] == pytest.approx(flop / row["median_s"] * 1e-9, rel=1e-4)
        if row["mode"] == "mm":
            assert row["ratio_mm"] == 1
        if row["mode"] == "full" and row["competitor"] != "mm":
            assert row["grad_error"] < 1e-5 and row["loss_error"] < 1e-5
    held = json.loads(stem.with_suffix(".json").read_text())
    assert held["run"]["threads"] == torch.get_num_threads() and len(held["results"]) == len(rows)


def test_plot_and_tables(run):
    stem, rows = run
    assert all(stem.with_suffix(ending).stat().st_size > 5000 for ending in (".png", ".svg"))
    text = table.render(stem.with_suffix(".csv"))
    ours = next(row for row in rows if row["competitor"] == "ours" and row["mode"] == "full")
    assert f"**{report.seconds(ours['median_s'])} ({report.ratio(ours['ratio_mm'])})**" in text
    assert text.count("| 24 | 32 |") == 2  # two betas
    assert table.render(stem.with_suffix(".csv"), ("forward", "full", "backward")).count("| 24 | 32 |") == 6
    assert "tiny.svg" in text
    document = "before\n<!-- bench tiny.csv -->\nold\n<!-- /bench -->\nafter\n"
    filled = table.insert(document, "tiny.csv", text)
    assert (
        filled.startswith("before\n")
        and filled.endswith("after\n")
        and text in filled
        and "old" not in filled
    )
    assert table.insert(filled, "tiny.csv", text) == filled
    with pytest.raises(ValueError, match=r"other\.csv"):
        table.insert(document, "other.csv", text)


def test_table_check(run, tmp_path, capsys):
    results = str(run[0].with_suffix(".csv"))
    page = tmp_path / "page.md"
    page.write_text("<!-- bench tiny.csv -->\n<!-- /bench -->\n")
    assert table.main([results, "--into", str(page), "--check"]) == 1
    assert table.main([results, "--into", str(page)]) == 0
    assert table.main([results, "--into", str(page), "--check"]) == 0
    page.write_text(page.read_text().replace("ms (", "hours (", 1))
    assert table.main([results, "--into", str(page), "--check"]) == 1
    page.write_text("no markers\n")
    with pytest.raises(ValueError, match=r"tiny\.csv"):
        table.main([results, "--into", str(page)])


def test_summary_of_a_run(run, tmp_path, monkeypatch):
    """The largest batch's times, and the picture, as links from where the page lies."""
    stem, rows = run
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("<!-- bench-summary tiny.csv -->\n<!-- /bench -->\n")
    monkeypatch.chdir(stem.parent)
    stem.with_suffix(".svg").unlink()
    assert table.main(["tiny.csv", "--plot", "--into", str(page)]) == 0
    text = page.read_text()
    full = [row for row in rows if row["mode"] == "full" and row["status"] == "ok"]
    largest = max(row["batch"] for row in full)
    ours = next(row for row in full if row["competitor"] == "ours" and row["batch"] == largest)
    assert f"B = {largest}" in text and f"**{report.seconds(ours['median_s'])}**" in text
    (picture,) = re.findall(r"!\[.*\]\((.+)\)", text)
    assert (page.parent / picture).resolve() == stem.with_suffix(".svg")
    assert (page.parent / picture).stat().st_size > 5000


def test_clip_case(tmp_path):
    stem = tmp_path / "clip"
    arguments = ["-B", "30", "-D", "16", "--problem", "clip", "--betas", "0", "--rounds", "3", "--no-plot"]
    competitors = ["--competitors", "ours", "portable", "eager", "chunked", "metric-learning"]
    assert main([*arguments, *competitors, "--shortest", "0.0001", "--out", str(stem)]) == 0
    rows = report.read_csv(stem.with_suffix(".csv"))
    full = {row["competitor"]: row["status"] for row in rows if row["mode"] == "full"}
    assert full == {
        "ours": "ok",
        "portable": "ok",
        "eager": "ok",
        "chunked": "ok",
        "metric-learning": "skipped",
    }
    saved = {row["competitor"]: row["saved_bytes"] for row in rows if row["mode"] == "memory"}
    assert saved["eager"] > 4 * 30 * 30 and saved.keys() == {"ours", "portable", "eager", "chunked"}


@pytest.mark.slow
def test_compiled_competitor_agrees():
    competitor = COMPETITORS["compile"]
    (inputs,) = make_inputs(SELF)
    errors = Checker(4096)(competitor, SELF, competitor.build(SELF), inputs)
    assert errors["grad_error"] < 1e-5


@pytest.mark.parametrize("problem", ["self", "clip"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_competitors_agree_with_float64(problem, dtype):
    case = replace(SELF, problem=problem, dtype=dtype, beta=0.0)
    (inputs,) = make_inputs(case)
    checked = 0
    for name, competitor in COMPETITORS.items():
        if name != "compile" and competitor.refuses(case) is None:
            Checker(4096)(competitor, case, competitor.build(case), inputs)
            checked += 1
    assert checked >= 3


def test_peers_of_other_losses_have_a_truth_of_their_own(monkeypatch):
    """Stand-ins for packages that need a GPU: called as they are to be, compared with what they compute."""
    asked = {}

    class Clip:
        def __init__(self, **options):
            asked.update(options)

        def __call__(self, x, y):
            s = F.normalize(x) @ F.normalize(y).T / asked["temperature"]
            target = torch.arange(len(s))
            return (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2

    def siglip(x, y, log_scale, bias):
        target = 2 * torch.eye(len(x)) - 1
        return -F.logsigmoid(target * (x @ y.T * log_scale.exp() + bias)).sum() / len(x)

    monkeypatch.setitem(sys.modules, "memeff", types.SimpleNamespace(MemoryEfficientCLIPLoss=Clip))
    monkeypatch.setitem(sys.modules, "siglip_kernel", types.SimpleNamespace(fused_siglip_loss=siglip))
    case = replace(SELF, problem="clip", beta=0.0)
    (inputs,) = make_inputs(case)
    checker = Checker(4096)
    for name in ("memeff", "siglip-kernel"):
        competitor = COMPETITORS[name]
        assert checker(competitor, case, competitor.build(case), inputs)["grad_error"] < 1e-5
        with pytest.raises(Disagreement):
            # The benchmark's own loss is not theirs.
            exact = replace(case, dtype="float64")
            Checker(4096)(competitor, exact, COMPETITORS["eager"].build(exact), inputs.to(torch.float64))
    assert asked == {"temperature": case.temperature, "stable": False}
    on_gpu = replace(case, device="cuda")
    for name in ("inf-cl", "memeff", "siglip-kernel"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert COMPETITORS[name].refuses(on_gpu) == f"{name} is not installed"
        monkeypatch.setattr("importlib.util.find_spec", lambda name: "there")
        assert COMPETITORS[name].refuses(replace(on_gpu, dim=32)) is None
        assert "beta=0" in COMPETITORS[name].refuses(replace(on_gpu, beta=1.0))


def test_chunked_is_the_reference(monkeypatch):
    """Many slabs, the last one short, give the whole matrix's loss and gradients."""
    monkeypatch.setattr("bench.competitors.slab_rows", lambda case: 7)
    for problem in ("self", "clip"):
        case = replace(SELF, problem=problem, dtype="float64")
        (inputs,) = make_inputs(case)
        value, grads = step(COMPETITORS["chunked"].build(case), inputs)
        expected, expected_grads = step(COMPETITORS["eager"].build(case), inputs)
        assert value == pytest.approx(expected, rel=1e-12)
        for got, want in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-15)


def test_a_wrong_competitor_is_not_timed(monkeypatch, tmp_path):
    right = COMPETITORS["eager"].build

    def wrong(case):
        return lambda inputs: right(case)(inputs) * 1.01

    liar = Competitor("eager", wrong)
    (inputs,) = make_inputs(SELF)
    with pytest.raises(Disagreement, match="differs from float64"):
        Checker(4096)(liar, SELF, liar.build(SELF), inputs)

    monkeypatch.setitem(COMPETITORS, "eager", liar)
    stem = tmp_path / "liar"
    arguments = ["-B", "32", "-D", "8", "--competitors", "ours", "eager", "--modes", "full", "--no-plot"]
    assert main([*arguments, "--rounds", "3", "--shortest", "0.0001", "--out", str(stem)]) == 1
    rows = {row["competitor"]: row for row in report.read_csv(stem.with_suffix(".csv"))}
    assert rows["ours"]["status"] == "ok"
    assert rows["eager"]["status"] == "failed" and rows["eager"]["median_s"] is None


def test_check_is_made_once_and_at_a_feasible_size():
    asked = []

    def build(case):
        asked.append(case.batch)
        return COMPETITORS["eager"].build(case)

    competitor, checker = Competitor("eager", build), Checker(16)
    for batch in (48, 96):
        case = replace(SELF, batch=batch)
        (inputs,) = make_inputs(case)
        checker(competitor, case, None, inputs)
    assert asked == [16]


def test_what_does_not_fit_is_skipped(tmp_path):
    eager = COMPETITORS["eager"]
    assert eager.reason_to_skip(SELF, 2**40) is None
    large = replace(SELF, batch=2**20)
    assert "GiB are free" in eager.reason_to_skip(large, 2**40)
    assert COMPETITORS["ours"].reason_to_skip(large, 2**40) is None
    stem = tmp_path / "small"
    arguments = ["-B", "600", "-D", "8", "--competitors", "ours", "eager", "--modes", "full", "memory"]
    limits = ["--memory-limit", str(2**20 / 2**30), "--rounds", "3", "--shortest", "0.0001", "--no-plot"]
    assert main([*arguments, *limits, "--out", str(stem)]) == 0
    rows = report.read_csv(stem.with_suffix(".csv"))
    status = {(row["competitor"], row["mode"]): row for row in rows}
    assert status["eager", "full"]["status"] == "skipped" and "GiB" in status["eager", "full"]["note"]
    assert status["ours", "full"]["status"] == "ok" and status["ours", "memory"]["peak_extra_bytes"] > 0
    assert "rows measured" in status["mm", "mm"]["note"]


def test_yardstick_in_slabs():
    whole = Yardstick.of(SELF, 2**30)
    assert (whole.rows, whole.factor) == (SELF.batch, 1.0)
    part = Yardstick.of(SELF, 2 * 20 * SELF.batch * 4)
    assert part.rows <= 20 and part.rows * part.factor == SELF.batch
    (inputs,) = make_inputs(SELF)
    assert part(inputs).shape == (part.rows, SELF.batch)


def test_saved_bytes_count_the_matrix_of_eager_but_not_of_ours():
    small, large = replace(SELF, batch=64), replace(SELF, batch=256)
    saved = {}
    for name in ("ours", "eager", "chunked"):
        for case in (small, large):
            (inputs,) = make_inputs(case)
            saved[name, case.batch] = memory.saved_bytes(COMPETITORS[name].build(case), inputs)
    assert saved["eager", 256] > 256 * 256 * 4 and saved["eager", 256] > 12 * saved["eager", 64]
    assert saved["ours", 256] <= 4.1 * saved["ours", 64]
    assert saved["chunked", 256] <= 4.1 * saved["chunked", 64]


@pytest.mark.slow
def test_cpu_memory_is_measured_in_a_fresh_process():
    """The peak sees what the step allocates: eager's several matrices."""
    case = replace(SELF, batch=2048)
    figures = memory.cpu_memory(case, "eager", 1)
    assert 3 * 4 * 2048**2 < figures["peak_extra_bytes"] < 40 * 4 * 2048**2
    assert memory.cpu_memory(case, "ours", 1)["peak_extra_bytes"] < 4 * 2048**2


def test_inputs():
    (inputs,) = make_inputs(SELF)
    again = make_inputs(SELF, copies=2)
    assert torch.equal(inputs.x, again[0].x) and not torch.equal(again[0].x, again[1].x)
    assert torch.bincount(inputs.labels).min() >= 2  # every anchor has a positive
    assert copies_to_leave_cache(SELF, 0) == 1
    assert copies_to_leave_cache(SELF, 48 * 20 * 4 * 5) == 10
    assert slab_rows(replace(SELF, batch=2**15)) * 2**15 * 4 == 2**24


def test_presets_name_what_exists():
    for blocks in PRESETS.values():
        for block in blocks:
            assert set(block.competitors) <= set(COMPETITORS)
            assert all(str(case) for case in block.cases("cpu", 0.5, 0))


def test_cuda_is_asked_for_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_panel_model_counts_every_pair():
    """Panels of self-contrast hold each pair of rows once, and few others; against keys all pairs once."""
    for rows, panel_rows, panel_columns in ((32768, 4096, 1024), (1000, 256, 96), (70, 40, 24), (1, 8, 8)):
        problem = panel_model.Problem(rows, 768, True, panel_rows, panel_columns)
        area = sum(r * c for r, c in problem.panels())
        pairs = rows * (rows - 1) // 2
        assert pairs <= area <= pairs + rows * (panel_columns + 1)
        against_keys = replace(problem, symmetric=False)
        assert sum(r * c for r, c in against_keys.panels()) == rows**2


def test_panel_model_products():
    """4 B²D in self-contrast, 8 B²D against keys, of which 6 B²D are counted; less of them, faster."""
    problem = panel_model.Problem()
    on = panel_model.Hardware()
    square = problem.rows**2 * problem.dim
    assert panel_model.cost(problem, on).product_flops == pytest.approx(4 * square, rel=0.05)
    assert panel_model.cost(replace(problem, symmetric=False), on).product_flops == 8 * square
    infinite = replace(on, l2_bytes_per_s=1e30, memory_bytes_per_s=1e30, launch_s=0, host_s=0)
    keys = panel_model.effective_tflops(replace(problem, symmetric=False), infinite)
    assert keys == pytest.approx(6 / 8 * on.product_flops / 1e12)


def test_panel_model_predicts_what_the_engine_is_for():
    assert panel_model.effective_tflops(panel_model.Problem()) >= 600
    assert panel_model.effective_tflops(panel_model.Problem(symmetric=False)) >= 340


def test_panel_model_prints_its_assumptions(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["panel_model", "--rows", "32768", "--dim", "768"])
    panel_model.main()
    printed = capsys.readouterr().out
    assert "Predictions" in printed and "| products 575 TFLOPS |" in printed


def test_the_docs_show_the_panel_models_predictions():
    """docs/cuda.md has the assumptions and the table as the command prints them."""
    text = (ROOT / "docs/cuda.md").read_text()
    on = panel_model.Hardware()
    problems = [panel_model.Problem(32768, d, s) for s in (True, False) for d in (256, 512, 768, 1024)]
    for part in (panel_model.assumptions(on), panel_model.table(problems, on)):
        assert part in text


def test_pages_show_committed_results():
    """What README and docs/benchmarks.md show is of the results file that they name."""
    results, pages = ROOT / "bench/results/cpu.csv", [ROOT / "README.md", ROOT / "docs/benchmarks.md"]
    assert table.main([str(results), "--into", *map(str, pages), "--check"]) == 0
