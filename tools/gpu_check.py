#!/usr/bin/env python3
"""Everything that only a GPU can show, in one command and within nine minutes.

Runs with the Python that it is started with, needs torch and pytest of it, and fetches nothing. The parts,
those first that are worth most:

    build        the extension for this GPU alone; to be left out where clce_ext/ has one built elsewhere
    probe        what the executor and the pipe model must know of the chip (tools/gpu_probe)
    tests        every test that has a device, on CUDA: accuracy, what only a chip decides, panels, the others
    bench        the figures that matter most, with peers (the benchmark's preset "goals")
    sanitizers   small and large cases under compute-sanitizer's four tools, at the same time

Each step has a limit of its own; what it leaves over goes to bench and sanitizers. Logs and results are in
one archive, written again after every step: gpu-check.tar.gz in $OUT, or else in bench/out. Its summary.txt
is also printed last. Exit status 0 only if every step passed. What to run on a GPU: docs/gpu-day.md

    python3 tools/gpu_check.py
    python3 tools/gpu_check.py probe bench       some of the parts, in this order
    python3 tools/gpu_check.py --rehearse        without a GPU: what can run, and a failure and a time-out
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 9 * 60
GRACE = 5  # seconds between asking a process to stop and killing it
PARTS = ("build", "probe", "tests", "bench", "sanitizers")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
TIME_LIMIT = "{time limit}"  # in a command: what the benchmark is told

ASK = """if True:
    import json, torch
    found = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}"}
        found |= {"multiprocessors": gpu.multi_processor_count}
    print(json.dumps(found))"""
# Whether what was built loads and runs here: without it tests would pass over the GPU.
KERNELS = """if True:
    import torch, clce_ext
    print(clce_ext.build_info())
    assert clce_ext.build_info()["cuda"], "no CUDA kernels: not built, or they do not load"
    x = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    clce_ext.hard_negative_contrastive_loss(x, torch.arange(64, device="cuda") % 8).backward()
    assert x.grad.isfinite().all() and x.grad.any(), "no gradient"
    print("the kernels run")"""
KERNELS_SECONDS = 60  # torch's first import, and the GPU's


def ask_machine() -> dict:
    """What this machine has, asked in a process of its own: torch must not hold the GPU meanwhile."""
    found = dict.fromkeys(("torch", "torch_cuda", "gpu", "capability", "multiprocessors"))
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    if done.returncode == 0:
        found |= json.loads(done.stdout.strip().splitlines()[-1])
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    for tool in ("nvcc", "compute-sanitizer", "ncu"):
        beside = Path(home, "bin", tool)
        found[tool] = str(beside) if beside.exists() else shutil.which(tool)
    return found | {"python": platform.python_version()}


def commit() -> str:
    """Of the sources: CLCE_COMMIT where they travel without their repository, maybe to where no git is."""
    if named := os.environ.get("CLCE_COMMIT"):
        return named
    try:
        ask = ["git", "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


Judge = Callable[[int | None], tuple[bool, str]]  # of an exit status, None after a time-out


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    limit: float  # seconds
    env: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()  # of what ask_machine() finds, and "kernels"
    stretches: bool = False  # may take what earlier steps left over
    planted: bool = False  # has to fail: a rehearsal's
    judge: Judge | None = None  # where the exit status does not say whether it passed, or not all

    @property
    def log(self) -> str:
        return re.sub(r"\W+", "-", self.name) + ".log"


# ---- what is run ----

Group = list[Step]  # at the same time


def build_steps(machine: dict, rehearse: bool, work: Path) -> list[Group]:
    command = [sys.executable, "setup.py", "build_ext"]
    if rehearse:
        command += ["--build-lib", str(work / "lib"), "--build-temp", str(work / "temp")]
        return [[Step("build", command, 130, {"CLCE_CUDA": "0"})]]
    # Sanitizers and profilers name lines of the source.
    env = {"CLCE_CUDA": "1", "NVCC_APPEND_FLAGS": "-lineinfo"}
    return [[Step("build", [*command, "--inplace"], 130, env, ("gpu", "nvcc"))]]


def probe_steps(machine: dict, rehearse: bool, results: Path) -> list[Group]:
    command = [sys.executable, "tools/gpu_probe/run.py", "--output", str(results / "probe")]
    needs = ("nvcc",) if rehearse else ("nvcc", "gpu")
    return [[Step("probe", command, 70, needs=needs)]]


def test_steps(machine: dict, rehearse: bool) -> list[Group]:
    pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["--continue-on-collection-errors"]  # some packages of other tests may be missing
    if rehearse:
        return [[Step("tests", [*pytest, "python_tests/test_arguments.py"], 60)]]
    env = {}
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", "4"]
        # What is compared with is computed on the CPU, of which each process has its share.
        env["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // 4, 1))
    on_gpu = ["-k", "cuda or tf32 or mixed_devices"]
    accuracy = ["python_tests/test_loss.py", "python_tests/test_edge_cases.py"]
    chip = "python_tests/test_gpu.py"
    others = [f"--ignore={path}" for path in (*accuracy, chip)]
    gpu = ("gpu", "kernels")
    return [
        [Step("tests: accuracy", [*pytest, *on_gpu, *accuracy], 50, env, gpu)],
        [Step("tests: the chip", [*pytest, chip], 40, env, gpu)],
        [Step("tests: panels", [*pytest, *on_gpu, *accuracy], 30, env | {"CLCE_ENGINE": "panels"}, gpu)],
        [Step("tests: others", [*pytest, *on_gpu, *others], 45, env, gpu)],
    ]


def bench_steps(machine: dict, rehearse: bool, results: Path) -> list[Group]:
    out = results / "bench"
    command = [sys.executable, "-m", "bench", "--out", str(out), "--no-plot"]
    if rehearse:
        return [[Step("bench", [*command, "--preset", "quick"], 60, judge=benchmark_judge(out))]]
    command += ["--device", "cuda", "--preset", "goals", "--time-limit", TIME_LIMIT]
    needs = ("gpu", "kernels")
    return [[Step("bench", command, 60, needs=needs, stretches=True, judge=benchmark_judge(out))]]


def sanitizer_steps(machine: dict, rehearse: bool) -> list[Group]:
    suite = [sys.executable, "tools/sanitizer_suite.py"]
    if rehearse:
        return [[Step("sanitizer suite", [*suite, "--device", "cpu"], 90)]]
    # Each tensor an allocation of its own, so that its ends are seen.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    group = []
    for tool in SANITIZERS:
        # torch asks the API for what there may not be, and goes on without it.
        command = [machine["compute-sanitizer"] or "", "--tool", tool, "--error-exitcode", "9"]
        command += ["--report-api-errors", "no"]
        # A library's products take long, and are not ours. initcheck has to see what they write.
        if tool != "initcheck":
            command += ["--kernel-name", "kns=clce"]
        command += suite
        group.append(Step(tool, command, 90, env, ("gpu", "compute-sanitizer", "kernels"), stretches=True))
    return [group]


def planted_steps() -> list[Group]:
    """A step that fails, and one that is not done in time and has a child."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    return [
        [Step("planted failure", [sys.executable, "-c", "raise SystemExit('as planted')"], 20, planted=True)],
        [Step("planted time-out", [sys.executable, "-c", child], 2, planted=True)],
    ]


def all_steps(parts: Iterable[str], machine: dict, rehearse: bool, results: Path, work: Path) -> list[Group]:
    makers = {
        "build": lambda: build_steps(machine, rehearse, work),
        "probe": lambda: probe_steps(machine, rehearse, results),
        "tests": lambda: test_steps(machine, rehearse),
        "bench": lambda: bench_steps(machine, rehearse, results),
        "sanitizers": lambda: sanitizer_steps(machine, rehearse),
    }
    planted = planted_steps() if rehearse else []
    return planted + [group for part in parts for group in makers[part]()]


def seconds_of(group: Group) -> float:
    return max(step.limit for step in group)


# ---- the benchmark's rows ----


def read_rows(table: Path) -> list[dict]:
    if not table.exists():
        return []
    with table.open() as file:
        return list(csv.DictReader(file))


def benchmark_judge(out: Path) -> Judge:
    """Ours was measured and did not fail. A competitor that did is only named."""

    def judge(status: int | None) -> tuple[bool, str]:
        rows = read_rows(out.with_suffix(".csv"))
        failed = sorted({row["competitor"] for row in rows if row["status"] == "failed"})
        measured = [row for row in rows if row["competitor"] == "ours" and row["status"] == "ok"]
        said = f"{len(rows)} rows" + (f"; failed: {', '.join(failed)}" if failed else "")
        return bool(measured) and "ours" not in failed and status in (0, 1, None), said

    return judge


def benchmark_lines(table: Path) -> list[str]:
    rows = [row for row in read_rows(table) if row["status"] == "ok"]
    rows = [row for row in rows if row["mode"] in ("mm", "forward", "full", "memory")]
    if not rows:
        return []
    widths = {"batch": 9, "dim": 6, "dtype": 10, "competitor": 17, "launch": 8, "mode": 9}
    figures = {"ms": ("median_s", 1e3), "/ mm": ("ratio_mm", 1), "TFLOP/s": ("gflops", 1e-3)}
    figures |= {"MiB": ("peak_extra_bytes", 2**-20)}
    head = "".join(f"{name:<{width}}" for name, width in widths.items())
    lines = ["", head + "".join(f"{name:>10}" for name in figures)]
    for row in rows:
        cells = "".join(f"{row[name]:<{width}}" for name, width in widths.items())
        numbers = (float(row[key]) * unit if row.get(key) else None for key, unit in figures.values())
        lines.append(cells + "".join(f"{'' if x is None else format(x, '.3f'):>10}" for x in numbers))
    return lines


# ---- how it is run ----


def own_group() -> None:
    """In a new process: a group of its own that heeds SIGINT, even where this one runs in the background."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


class Check:
    """Runs steps, and keeps what they leave in ``results`` and, after each, in ``archive``."""

    def __init__(self, machine: dict, results: Path, archive: Path, rehearse: bool, seconds: float = SECONDS):
        self.machine, self.results, self.archive, self.rehearse = machine, results, archive, rehearse
        self.started, self.seconds = time.monotonic(), seconds
        self.steps: list[dict] = []
        self.running: list[subprocess.Popen] = []

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def note(self, step: Step, passed: bool | None, seconds: float = 0.0, detail: str = "") -> None:
        if step.planted and passed is not None:
            passed, detail = not passed, f"planted; {detail}"
        status = {True: "passed", False: "failed", None: "skipped"}[passed]
        self.steps.append(
            {"step": step.name, "status": status, "seconds": round(seconds, 1), "detail": detail}
        )
        after = time.monotonic() - self.started
        print(f"[{after:5.0f} s] {status:<7} {step.name}" + (f": {detail}" if detail else ""), flush=True)

    def run_all(self, groups: list[Group]) -> None:
        for i, group in enumerate(groups):
            later = sum(map(seconds_of, groups[i + 1 :]))
            self.run(group, self.left() - later)
            self.pack()

    def run(self, group: Group, spare: float) -> None:
        """``spare``: seconds that nobody else has a claim to; a step that stretches takes them."""
        started = []
        for step in group:
            if missing := [need for need in step.needs if not self.has(need)]:
                detail = f"needs {', '.join(missing)}: not found here"
                self.note(step, None if self.rehearse else False, detail=detail)
                continue
            limit = min(max(step.limit, spare) if step.stretches else step.limit, self.left() - GRACE)
            if limit < 1:
                self.note(step, False, detail="no time left")
                continue
            started.append((step, self.start(step, limit), time.monotonic(), limit))
        for step, process, begin, limit in started:
            status = self.wait(process, begin + limit)
            self.note(step, *self.verdict(step, status, time.monotonic() - begin, limit))

    def has(self, need: str) -> bool:
        # Not before: an earlier step may have built them.
        if need == "kernels" and need not in self.machine and self.machine.get("gpu"):
            step = Step(need, [sys.executable, "-c", KERNELS], KERNELS_SECONDS)
            process = self.start(step, step.limit)
            self.machine[need] = self.wait(process, time.monotonic() + step.limit) == 0
        return bool(self.machine.get(need))

    def start(self, step: Step, limit: float) -> subprocess.Popen:
        # A case that is begun in time takes longer than that.
        words = [str(max(round(limit - 20), 1)) if word == TIME_LIMIT else word for word in step.command]
        with (self.results / step.log).open("w") as log:
            process = subprocess.Popen(
                words, cwd=ROOT, env=os.environ | step.env, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, preexec_fn=own_group,
            )  # fmt: skip
        self.running.append(process)
        return process

    def wait(self, process: subprocess.Popen, deadline: float) -> int | None:
        """The exit status; None where it had to be stopped. Nothing of its process group is left."""
        status = None
        try:
            status = process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            signal_group(process, signal.SIGINT)  # pytest and the benchmark say what they have
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        signal_group(process, signal.SIGKILL)
        process.wait()
        self.running.remove(process)
        return status

    def verdict(self, step: Step, status: int | None, took: float, limit: float) -> tuple[bool, float, str]:
        lines = (self.results / step.log).read_text(errors="replace").splitlines()
        detail = next((line.strip() for line in reversed(lines) if line.strip()), "")
        passed = status == 0
        if step.judge:
            passed, detail = step.judge(status)
        if status is None:
            detail = f"stopped after {limit:.0f} s; {detail}"
        return passed, took, detail[:160]

    def stop(self) -> None:
        for process in self.running:
            signal_group(process, signal.SIGKILL)

    def summary(self) -> str:
        m = self.machine
        gpu = m["gpu"] or "no GPU"
        lines = [f"gpu check: {gpu}, torch {m['torch']}, commit {commit()}, {time.strftime('%Y-%m-%d')}"]
        for step in self.steps:
            lines.append(
                f"{step['status']:<8}{step['step']:<18}{step['seconds']:>7.1f} s  {step['detail'][:90]}"
            )
        lines += benchmark_lines(self.results / "bench.csv")
        failed = ", ".join(step["step"] for step in self.steps if step["status"] == "failed")
        seconds = time.monotonic() - self.started
        lines += ["", f"{seconds:.0f} s; " + (f"failed: {failed}" if failed else "nothing failed")]
        return "\n".join(lines)

    def pack(self) -> None:
        """The results so far, as one file."""
        (self.results / "summary.txt").write_text(self.summary() + "\n")
        record = {"machine": self.machine, "commit": commit(), "steps": self.steps}
        (self.results / "check.json").write_text(json.dumps(record, indent=1) + "\n")
        part = self.archive.with_name(self.archive.name + ".part")
        with tarfile.open(part, "w:gz") as tar:
            tar.add(self.results, self.archive.name.removesuffix(".tar.gz"))
        part.replace(self.archive)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all unless named")
    parser.add_argument("--archive", type=Path, help="where results go; a name that ends in .tar.gz")
    parser.add_argument("--rehearse", action="store_true", help="leave out what needs a GPU")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}; there are {', '.join(PARTS)}")
    folder = Path(os.environ.get("OUT") or ROOT / "bench/out")
    archive = (args.archive or folder / "gpu-check.tar.gz").resolve()
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        results, work = Path(name, "results"), Path(name, "work")
        results.mkdir()
        check = Check(ask_machine(), results, archive, args.rehearse)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu check: stopped"))
        try:
            parts = args.parts or PARTS
            check.run_all(all_steps(parts, check.machine, args.rehearse, results, work))
        finally:
            check.stop()
            check.pack()
        print(f"\n{check.summary()}\nresults: {archive}")
    return 1 if any(step["status"] == "failed" for step in check.steps) else 0


if __name__ == "__main__":
    sys.exit(main())
