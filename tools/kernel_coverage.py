"""Whether the C++ tests have taken each CUDA kernel where it can go wrong.

The executor writes what each instantiation of a kernel did (executor/coverage.h). This adds up the files of
all test processes and compares them with the kernels in the test program. One that walks over tiles must have

* walked over several tiles of several steps each in one block,
* been round its pipeline's ring twice, so that every place was used again,
* had tiles with fewer rows, and with fewer columns, than they have room for.

Every kernel must have run, in several blocks.

    kernel_coverage.py --binary build/cpp_tests/test_kernels FILE...
"""

import argparse
import csv
import re
import subprocess
import sys
from pathlib import Path

KERNEL = re.compile(r"(?:void )?clce::cuda::(?:\w+::)*\w+_kernel[<(]")

# What a kernel must have done, as tests of its numbers.
EVERY_KERNEL = {"several blocks": lambda n: n["blocks"] > 1}
WALKING_KERNEL = {
    "several tiles of several steps": lambda n: n["several_step_tiles"] > 1,
    "twice round the ring": lambda n: n["wraps"] > 1,
    "partial rows": lambda n: n["partial_rows"] > 0,
    "partial columns": lambda n: n["partial_columns"] > 0,
}

# Kernels, by the beginning of their names, that need not have done one of these; and why.
EXCEPTIONS = {
    ("clear_kernel", "several blocks"): "the executor's own, one thread; a GPU has cudaMemset",
    ("find_unit_kernel", "several blocks"): "one block finds one number",
    ("gradient_factors_kernel", "several blocks"): "one block computes two numbers",
    ("loss_kernel", "several blocks"): "one block adds up the loss of statistics",
    ("temperature_gradient_kernel", "several blocks"): "one block adds up two numbers of each row",
    ("backward_kernel<ResidentTraits", "several tiles of several steps"): "a tile is one step",
    ("forward_kernel<ForwardTraits<FmaProduct<double>", "partial columns"): "rows are padded to whole steps",
}


def kernels_of(binary, nm="nm"):
    """The instantiations of kernels in a program: their symbols, and their names for people."""
    symbols = [line.split()[-1] for line in run([nm, "--defined-only", binary]).splitlines()]
    symbols = [symbol for symbol in symbols if symbol.startswith("_ZN4clce4cuda") and "." not in symbol]
    names = run(["c++filt"], input="\n".join(symbols)).splitlines()
    found = zip(symbols, names, strict=True)
    return {symbol: short_name(name) for symbol, name in found if KERNEL.match(name)}


def run(command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def short_name(name):
    """Without what all of them have in common, and without parameters."""
    name = name.removeprefix("void ")
    end = len(name) if not name.endswith(")") else name.rindex("(")
    return name[:end].replace("clce::cuda::", "").replace("clce::ptx::", "")


def read_runs(paths):
    """What each kernel did at most, by its symbol."""
    runs = {}
    for path in paths:
        with Path(path).open(newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                numbers = runs.setdefault(row.pop("kernel"), {})
                for key, value in row.items():
                    numbers[key] = max(numbers.get(key, 0), int(value))
    return runs


def walks(numbers):
    return numbers.get("tiles", 0) > 0 or numbers.get("wraps", 0) > 0


def find_gaps(kernels, runs, exceptions=EXCEPTIONS):
    """What kernels have not done, and exceptions that nobody needs, as lines of text."""
    base = {symbol: name.split("<")[0] for symbol, name in kernels.items()}
    # One that only leaves at once does not look like one that walks.
    walking = {base[symbol] for symbol in kernels if walks(runs.get(symbol, {}))}
    gaps, needed = [], set()
    for symbol, name in sorted(kernels.items(), key=lambda item: item[1]):
        if symbol not in runs:
            gaps.append(f"{name}: never ran")
            continue
        asked = EVERY_KERNEL | (WALKING_KERNEL if base[symbol] in walking else {})
        for what, done in asked.items():
            if done(runs[symbol]):
                continue
            excused = {key for key in exceptions if name.startswith(key[0]) and what == key[1]}
            needed |= excused
            if not excused:
                numbers = ", ".join(f"{key} {value}" for key, value in runs[symbol].items())
                gaps.append(f"{name}: never {what} ({numbers})")
    gaps += [f"exception that nobody needs: {key}" for key in exceptions if key not in needed]
    if not walking:
        gaps.append("no kernel walked over tiles")
    return gaps


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--binary", required=True, help="the test program")
    parser.add_argument("--nm", default="nm", help="lists a program's symbols")
    parser.add_argument("files", nargs="+", help="what its processes have written")
    args = parser.parse_args()
    kernels, runs = kernels_of(args.binary, args.nm), read_runs(args.files)
    gaps = find_gaps(kernels, runs)
    for gap in gaps:
        print(gap)
    print(f"{len(kernels)} kernels, {len(gaps)} gaps")
    sys.exit(bool(gaps))


if __name__ == "__main__":
    main()
