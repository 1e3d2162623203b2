#!/usr/bin/env python3
"""Everything that only a GPU can show, in one command and within nine minutes.

Asks the GPU what the executor and the pipe model must know (gpu_probe), builds for it, runs every test that
has a device on CUDA, a reduced suite under compute-sanitizer (memcheck, racecheck, initcheck, synccheck), and
the benchmark with its peers. Leaves in the folder: logs of every step, what the probe found, check.json, the
benchmark's CSV and JSON, and summary.txt, which is also printed last. Exit status 0 only if every step
passed.

    python tools/gpu_check.py --output bench/results/h100
    python tools/gpu_check.py --rehearse       without a GPU: runs what can run, names what is left out
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 9
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def probe() -> dict:
    """What this machine has, asked in a process of its own: torch must not hold the GPU meanwhile."""
    code = """if True:
        import json, torch
        found = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_properties(0)
            found |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}"}
            found |= {"multiprocessors": gpu.multi_processor_count}
        print(json.dumps(found))"""
    found = {"python": platform.python_version()}
    found |= dict.fromkeys(("torch", "torch_cuda", "gpu", "capability", "multiprocessors"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode == 0:
        found |= json.loads(done.stdout.strip().splitlines()[-1])
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    for tool in ("nvcc", "compute-sanitizer", "nvidia-smi"):
        beside = Path(home, "bin", tool)
        found[tool] = str(beside) if beside.exists() else shutil.which(tool)
    return found


def sanitizer_suite() -> None:
    """Small cases through every CUDA kernel, forward and backward. compute-sanitizer runs this."""
    import torch

    from clce_ext import backends, hard_negative_contrastive_loss

    torch.manual_seed(0)
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    backends.use_engine("panels")  # which small batches are not computed by otherwise
    for dtype in dtypes:
        z = torch.randn(70, 33, device="cuda", dtype=dtype, requires_grad=True)
        keys = torch.randn(300, 33, device="cuda", dtype=dtype, requires_grad=True)
        labels, key_labels = torch.arange(70, device="cuda") % 5, torch.arange(300, device="cuda") % 5
        hard_negative_contrastive_loss(z, labels).backward()
        hard_negative_contrastive_loss(z, labels, keys=keys, key_labels=key_labels).backward()
    backends.use_engine(None)
    for dtype in dtypes:
        for rows, dim, options in (
            (70, 33, {}),
            (130, 200, {"temperature": 0.01}),
            (67, 300, {"beta": 0.5}),
            (65, 600, {"beta": 0.0}),
            (40, 900, {"reduction": "none"}),
            (33, 24, {"temperature": torch.tensor(0.2, device="cuda", requires_grad=True)}),
        ):
            z = torch.randn(rows, dim, device="cuda", dtype=dtype, requires_grad=True)
            labels = torch.randint(0, 7, (rows,), device="cuda")
            hard_negative_contrastive_loss(z, labels, **options).sum().backward()
            assert torch.isfinite(z.grad).all(), f"gradient of {dtype}, {rows} x {dim}, {options}"
        z = torch.randn(20, 40, device="cuda", dtype=dtype, requires_grad=True)
        keys = torch.randn(300, 40, device="cuda", dtype=dtype, requires_grad=True)
        labels, key_labels = torch.arange(20, device="cuda") % 5, torch.arange(300, device="cuda") % 5
        hard_negative_contrastive_loss(z, labels, keys=keys, key_labels=key_labels).backward()
    for allowed in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        z = torch.randn(100, 96, device="cuda", requires_grad=True)
        hard_negative_contrastive_loss(z, torch.randint(0, 9, (100,), device="cuda")).backward()
    torch.cuda.synchronize()
    print("suite done")


class Check:
    def __init__(self, output: Path, rehearse: bool):
        self.output, self.rehearse = output, rehearse
        self.started = time.monotonic()
        self.machine = probe()
        self.steps: list[dict] = []

    def left(self) -> float:
        return MINUTES * 60 - (time.monotonic() - self.started)

    def note(self, name: str, status: str, seconds: float = 0.0, detail: str = "") -> None:
        self.steps.append({"step": name, "status": status, "seconds": round(seconds, 1), "detail": detail})
        after = time.monotonic() - self.started
        print(f"[{after:5.0f} s] {status:<7} {name}" + (f": {detail}" if detail else ""), flush=True)

    def run(self, name: str, command: list[str], limit: float, env: dict | None = None, needs=()) -> bool:
        """Runs a step with at most `limit` seconds, and never beyond the whole check's time."""
        missing = ", ".join(need for need in needs if not self.machine.get(need))
        if missing:
            status = "skipped" if self.rehearse else "failed"
            self.note(name, status, detail=f"needs {missing}: not found here")
            return False
        limit = min(limit, self.left() - 5)
        if limit < 5:
            self.note(name, "failed", detail="no time left")
            return False
        begin = time.monotonic()
        log = self.output / f"{name.replace(' ', '-')}.log"
        with log.open("w") as file:
            streams = {"stdout": file, "stderr": subprocess.STDOUT}
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=os.environ | (env or {}), timeout=limit, **streams
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else ""
        detail = f"longer than {limit:.0f} s; {last}" if code is None else last
        self.note(name, "passed" if code == 0 else "failed", time.monotonic() - begin, detail[:160])
        return code == 0

    def all_steps(self) -> None:
        gpu, python = self.machine["gpu"], sys.executable
        if gpu is None:
            outcome = "are left out" if self.rehearse else "fail"
            print(f"no GPU that torch can use: the steps that need one {outcome}")
        needs_gpu = () if self.rehearse else ("gpu",)
        probe = [python, str(ROOT / "tools/gpu_probe/run.py"), "--output", str(self.output / "probe")]
        self.run("probe", probe, 60, needs=("nvcc", *needs_gpu))
        # Only for this GPU: a build for all takes minutes.
        env = {"TORCH_CUDA_ARCH_LIST": self.machine["capability"], "CLCE_CUDA": "1"} if gpu else {}
        self.run("build", [python, "setup.py", "build_ext", "--inplace"], 200, env, ("nvcc", *needs_gpu))
        tests = [python, "-m", "pytest", "-q", "--maxfail", "20", "-p", "no:cacheprovider"]
        # On CUDA all that has a device; the rest is CI's.
        tests += ["-k", "cuda or tf32 or mixed_devices"] if gpu else ["python_tests/test_arguments.py"]
        self.run("tests", tests, 150, needs=needs_gpu)
        if gpu:
            losses = ["python_tests/test_loss.py", "python_tests/test_edge_cases.py"]
            self.run("tests by panels", [*tests, *losses], 60, {"CLCE_ENGINE": "panels"})
        for tool in SANITIZERS:
            command = [self.machine["compute-sanitizer"] or "", "--tool", tool, "--error-exitcode", "9"]
            command += [python, __file__, "--sanitizer-suite"]
            # Each tensor an allocation of its own, so that its ends are seen.
            env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            self.run(tool, command, 60, env, ("gpu", "compute-sanitizer"))
        bench = [python, "-m", "bench", "--out", str(self.output / "bench"), "--no-plot"]
        if gpu:
            limit = min(200, max(10.0, self.left() - 45))
            bench += ["--device", "cuda", "--preset", "h100", "--time-limit", str(limit)]
        else:
            bench += ["--preset", "quick"]
        self.run("benchmark", bench, 240, needs=needs_gpu)

    def benchmark_rows(self) -> list[str]:
        table = self.output / "bench.csv"
        if not table.exists():
            return []
        with table.open() as file:
            rows = [row for row in csv.DictReader(file) if row["status"] == "ok" and row["mode"] == "full"]
        widths = {"batch": 8, "dim": 6, "dtype": 10, "beta": 5, "competitor": 17, "launch": 8}
        lines = ["", "".join(f"{name:<{width}}" for name, width in widths.items()) + "        ms"]
        for row in rows:
            cells = "".join(f"{row[name]:<{width}}" for name, width in widths.items())
            lines.append(cells + f"{float(row['median_s']) * 1e3:>10.3f}")
        return lines

    def summary(self) -> str:
        gpu = self.machine["gpu"] or "no GPU (rehearsal)"
        lines = [f"gpu check: {gpu}, torch {self.machine['torch']}, {time.strftime('%Y-%m-%d')}"]
        for step in self.steps:
            lines.append(
                f"{step['status']:<8}{step['step']:<12}{step['seconds']:>7.1f} s  {step['detail'][:80]}"
            )
        lines += self.benchmark_rows()
        failed = ", ".join(step["step"] for step in self.steps if step["status"] == "failed")
        seconds = time.monotonic() - self.started
        lines += ["", f"{seconds:.0f} s; " + (f"failed: {failed}" if failed else "nothing failed")]
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "bench/out/gpu_check")
    parser.add_argument(
        "--rehearse", action="store_true", help="leave out what needs a GPU instead of failing"
    )
    parser.add_argument("--sanitizer-suite", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sanitizer_suite:
        sys.path.insert(0, str(ROOT))
        sanitizer_suite()
        return 0
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    check = Check(args.output, args.rehearse)
    check.all_steps()
    text = check.summary()
    (args.output / "check.json").write_text(
        json.dumps({"machine": check.machine, "steps": check.steps}, indent=2) + "\n"
    )
    (args.output / "summary.txt").write_text(text + "\n")
    print("\n" + text)
    return 1 if any(step["status"] == "failed" for step in check.steps) else 0


if __name__ == "__main__":
    sys.exit(main())
