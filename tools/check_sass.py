#!/usr/bin/env python3
"""Reads what the compiler made of the CUDA kernels; needs nvcc and nvdisasm (see sass.py), but no GPU.

Fails, with a table of all kernels, where one spills registers, keeps an array in local memory, takes more
registers than its launch bounds leave to it, or does not use the tensor cores although its product is made
for them.

    python tools/check_sass.py                           sm_80 and sm_90, all of csrc/cuda/sources.txt
    python tools/check_sass.py --arch 86 --only float16  others; files whose path contains a word

That is what ships: sm_86 and sm_89 run what is compiled for sm_80 (setup.py). Sources for a single
architecture, such as 90a, are compiled for it where 90 is asked for.
"""

from __future__ import annotations

import argparse
import sys

import sass

REGISTERS = 65536  # of a multiprocessor, all architectures since sm_80
TENSOR_CORE_PRODUCTS = ("HalfProduct", "Tf32Product")


def number_of(kernel: sass.Kernel, *ops: str) -> int:
    return sum(instruction.op in ops for instruction in kernel.code.instructions)


def faults_of(kernel: sass.Kernel) -> list[str]:
    faults = []
    if kernel.spills:
        faults.append("spills")
    if number_of(kernel, "LDL", "STL") or kernel.stack:
        faults.append("local memory")
    per_warp = -(-kernel.registers // 8) * 8 * 32
    if per_warp * (kernel.threads // 32) * kernel.blocks > REGISTERS:
        faults.append("registers beyond launch bounds")
    if any(product in kernel.name for product in TENSOR_CORE_PRODUCTS) and not number_of(kernel, "HMMA"):
        faults.append("no tensor core instruction")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["80", "90"], help="compute capabilities, 80 for sm_80")
    parser.add_argument("--only", default="", help="only source files whose path contains this")
    parser.add_argument("--jobs", type=int)
    args = parser.parse_args()

    kernels = sass.kernels(args.arch, args.only, args.jobs)
    if not kernels:
        sys.exit(f"check_sass: no kernel in files named *{args.only}*")
    columns = ("arch", "regs", "threads", "blocks", "stack", "spills", "local", "mma")
    print(" ".join(f"{column:>7}" for column in columns) + "  kernel")
    bad = 0
    for k in sorted(kernels, key=lambda k: (k.arch, k.name)):
        faults = faults_of(k)
        bad += bool(faults)
        local, mma = number_of(k, "LDL", "STL"), number_of(k, "HMMA")
        values = (f"sm_{k.arch}", k.registers, k.threads, k.blocks, k.stack, k.spills, local, mma)
        why = f"  <- {', '.join(faults)}" if faults else ""
        print(" ".join(f"{value:>7}" for value in values) + f"  {k.name}{why}")
    print(f"{len(kernels)} kernels, {bad} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
