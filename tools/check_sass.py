#!/usr/bin/env python3
"""Compiles the CUDA kernels and reads what the compiler made of them; needs no GPU.

Fails, with a table of all kernels, where one spills registers, keeps an array in local memory, takes more
registers than its launch bounds leave to it, or does not use the tensor cores although its product is made
for them. Needs nvcc (CUDA_HOME or PATH) and nvdisasm (a CUDA toolkit, Triton, or
`pip install nvidia-cuda-nvdisasm`).

    python tools/check_sass.py                           sm_80 and sm_90, all of csrc/cuda/sources.txt
    python tools/check_sass.py --arch 86 --only float16  others; files whose path contains a word

Sources for a single architecture, such as 90a, are compiled for it where 90 is asked for.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REGISTERS = 65536  # of a multiprocessor, all architectures since sm_80
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)")  # address, predicate, name
TENSOR_CORE_PRODUCTS = ("HalfProduct", "Tf32Product")


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    threads: int = 0
    blocks: int = 1
    local: int = 0  # LDL and STL instructions
    mma: int = 0  # HMMA instructions

    def faults(self) -> list[str]:
        faults = []
        if self.spills:
            faults.append("spills")
        if self.local or self.stack:
            faults.append("local memory")
        per_warp = -(-self.registers // 8) * 8 * 32
        if per_warp * (self.threads // 32) * self.blocks > REGISTERS:
            faults.append("registers beyond launch bounds")
        if any(product in self.name for product in TENSOR_CORE_PRODUCTS) and not self.mma:
            faults.append("no tensor core instruction")
        return faults


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home, "bin/nvcc")] if home else []
    found = shutil.which("nvcc")
    candidates += [Path(found)] if found else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for candidate in candidates:
        if candidate.exists():
            return str(candidate)
    sys.exit("check_sass: no nvcc: set CUDA_HOME or put nvcc on PATH")


def find_nvdisasm(nvcc: str) -> str:
    candidates = [Path(nvcc).with_name("nvdisasm")]
    found = shutil.which("nvdisasm")
    candidates += [Path(found)] if found else []
    for folder in map(Path, sys.path):
        candidates += sorted(folder.glob("nvidia/*/bin/nvdisasm"))
        candidates.append(folder / "triton/backends/nvidia/bin/nvdisasm")
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    sys.exit("check_sass: no nvdisasm: pip install nvidia-cuda-nvdisasm")


def sources_for(arch: str) -> list[tuple[str, str]]:
    """Sources and what each is compiled for: with 90 those for all, and those for 90a alone as 90a."""
    sources = []
    for line in (ROOT / "csrc/cuda/sources.txt").read_text().splitlines():
        source, _, only = line.partition(" ")
        only = only.strip().replace(".", "")
        if source.endswith(".cu") and only.rstrip("af") in ("", arch):
            sources.append((source, only or arch))
    return sources


def readable(names: list[str]) -> dict[str, str]:
    """Demangled, without what all names have."""
    filt = shutil.which("c++filt")
    plain = names
    if filt and names:
        plain = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True).stdout.split(
            "\n"
        )
    out = {}
    for mangled, name in zip(names, plain, strict=True):
        name = re.sub(r"^void |clce::(cuda::)?|ptx::", "", name)
        out[mangled] = re.sub(r">\(.*\)$", ">", name)
    return out


def compile_one(nvcc: str, nvdisasm: str, source: str, arch: str, folder: Path) -> dict[str, Kernel]:
    work = folder / f"{Path(source).stem}_{arch}"
    work.mkdir()
    cubin = work / "out.cubin"
    command = [
        nvcc,
        "-std=c++17",
        "--expt-relaxed-constexpr",
        f"-I{ROOT / 'csrc'}",
        "-cubin",
        f"-arch=sm_{arch}",
    ]
    command += ["-Xptxas", "-v", "--keep", "--keep-dir", str(work), "-o", str(cubin), str(ROOT / source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"check_sass: {source} does not compile for sm_{arch}:\n{done.stderr}")
    kernels: dict[str, Kernel] = {}

    entry = None
    for line in done.stderr.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            entry = kernels.setdefault(match[1], Kernel(match[1], arch))
        if entry is None:
            continue
        if match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            entry.stack, entry.spills = int(match[1]), int(match[2]) + int(match[3])
        if match := re.search(r"Used (\d+) registers", line):
            entry.registers = int(match[1])

    for ptx in work.glob("*.ptx"):
        for match in re.finditer(r"\.entry (\w+)\((.*?)\{", ptx.read_text(), re.S):
            if match[1] not in kernels:
                continue
            if bound := re.search(r"\.maxntid (\d+)", match[2]):
                kernels[match[1]].threads = int(bound[1])
            if bound := re.search(r"\.minnctapersm (\d+)", match[2]):
                kernels[match[1]].blocks = int(bound[1])

    entry = None
    listing = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines():
        if match := re.match(r"\s*\.text\.(\S+):", line):
            entry = kernels.get(match[1])
        elif entry is not None and (match := INSTRUCTION.match(line)):
            entry.local += match[1] in ("LDL", "STL")
            entry.mma += match[1] == "HMMA"
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["80", "90"], help="compute capabilities, 80 for sm_80")
    parser.add_argument("--only", default="", help="only source files whose path contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()

    nvcc = find_nvcc()
    nvdisasm = find_nvdisasm(nvcc)
    kernels: list[Kernel] = []
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(compile_one, nvcc, nvdisasm, source, arch, Path(folder))
            for asked in args.arch
            for source, arch in sources_for(asked)
            if args.only in source
        ]
        for job in jobs:
            kernels += job.result().values()
    if not kernels:
        sys.exit(f"check_sass: no kernel in files named *{args.only}*")

    names = readable([k.name for k in kernels])
    columns = ("arch", "regs", "threads", "blocks", "stack", "spills", "local", "mma")
    print(" ".join(f"{column:>7}" for column in columns) + "  kernel")
    bad = 0
    for k in sorted(kernels, key=lambda k: (k.arch, names[k.name])):
        faults = k.faults()
        bad += bool(faults)
        values = (f"sm_{k.arch}", k.registers, k.threads, k.blocks, k.stack, k.spills, k.local, k.mma)
        why = f"  <- {', '.join(faults)}" if faults else ""
        print(" ".join(f"{value:>7}" for value in values) + f"  {names[k.name]}{why}")
    print(f"{len(kernels)} kernels, {bad} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
