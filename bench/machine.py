"""Where and with what a measurement was made."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import psutil
import torch

import clce_ext

_ROOT = Path(__file__).resolve().parent.parent


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def metadata(device: str) -> dict:
    """The columns that are the same for every row of a run."""
    build = clce_ext.build_info()
    # A results folder that grows does not make the measured code another one.
    changed = _git(
        "status", "--porcelain", "--", "csrc", "clce_ext", "bench/*.py", "python_tests/reference.py"
    )
    # Sources that travel without their repository have its name with them.
    commit = os.environ.get("CLCE_COMMIT") or _git("rev-parse", "--short=12", "HEAD") or "unknown"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit + ("+changes" if changed else ""),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device.startswith("cuda") else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "clce_ext": build["version"],
        "cpu_capability": build["cpu_capability"],
        "blas": build.get("blas", ""),
        "cuda": build["cuda"] or "",
        "cuda_archs": " ".join(map(str, build["cuda_archs"] or [])),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "load": f"{psutil.getloadavg()[0]:.2f}",
    }


def available_bytes(device: str) -> int:
    """Memory that a competitor may take: four fifths of what is free."""
    if device.startswith("cuda"):
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(0.8 * (torch.cuda.mem_get_info()[0] + cached))
    free = psutil.virtual_memory().available
    try:  # a container's limit, where there is one
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            free = min(free, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return int(0.8 * free)


def cache_bytes(device: str) -> int:
    """The L2 cache that successive runs share (CUDA; on a CPU what stays cached is part of the use)."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.startswith("cuda") else 0
