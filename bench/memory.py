"""Extra memory of forward and backward: what is held beyond the inputs, at its peak.

On a CPU each measurement is a fresh process (``python -m bench.memory CASE COMPETITOR``), whose peak
resident size is compared with what it was before the step. On CUDA the allocator counts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench.cases import Case, Inputs, make_inputs
from bench.competitors import COMPETITORS, Loss

_ROOT = Path(__file__).resolve().parent.parent


def saved_bytes(loss: Loss, inputs: Inputs) -> int:
    """Bytes of the storages that autograd holds between forward and backward, the inputs' excluded."""
    own = {t.untyped_storage().data_ptr() for t in [*inputs.leaves, inputs.labels] if t is not None}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(inputs)  # holds the graph, so no address is used twice
    del value
    return sum(storages.values())


def _step(loss: Loss, inputs: Inputs) -> None:
    torch.autograd.grad(loss(inputs), inputs.leaves)


def cuda_peak_bytes(loss: Loss, inputs: Inputs) -> int:
    """Peak of allocated device memory during a step, beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _step(loss, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _trim() -> None:
    gc.collect()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _cpu_peak_bytes(loss: Loss, inputs: Inputs) -> int:
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # starts a new peak (VmHWM)
    except OSError:
        # Without it the peak is the process's own: right as long as nothing larger ran before.
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        _step(loss, inputs)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    before = _status_bytes("VmRSS")
    _step(loss, inputs)
    return _status_bytes("VmHWM") - before


def _measure_here(case: Case, name: str) -> dict:
    competitor = COMPETITORS[name]
    (inputs,) = make_inputs(case)
    # Threads and libraries first, on a small case; a compiler has to see the size itself.
    small = case if name == "compile" else replace(case, batch=min(case.batch, 64))
    warm = competitor.build(small)
    (warm_inputs,) = (inputs,) if small is case else make_inputs(small)
    _step(warm, warm_inputs)
    loss = warm if small is case else competitor.build(case)
    peak = _cpu_peak_bytes(loss, inputs)
    return {"peak_extra_bytes": peak, "saved_bytes": saved_bytes(loss, inputs)}


def cpu_memory(case: Case, name: str, threads: int) -> dict:
    """``peak_extra_bytes`` and ``saved_bytes`` of one step, measured in a process of its own."""
    command = [sys.executable, "-m", "bench.memory", json.dumps(asdict(case)), name, str(threads)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RuntimeError(f"memory of {name}, {case}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(_measure_here(Case(**json.loads(sys.argv[1])), sys.argv[2])))
