#!/usr/bin/env python3
"""Asks a GPU what the executor and the pipe model have to know; needs nvcc and a GPU, torch for one part.

answers.cu asks for bits: mma on operands that tell rounding and order, ldmatrix, ex2.approx, conversions.
rates.cu measures what tools/gpu_table.py assumes; a third part times library products with float32 results.
Everything goes into one folder of small files: answers.json says what is in each .bin (questions.cuh writes
them), and what the sums of mma look like; rates.json and products.json hold figures. Committed under
executor/goldens the answers are compared with the executor's in every run of its tests. Without a GPU nothing
but the compilation is done.

    python tools/gpu_probe/run.py --output executor/goldens/h100
    python tools/gpu_probe/run.py --compile-only          for sm_80 and sm_90
"""

from __future__ import annotations

import argparse
import array
import json
import math
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

import sass  # noqa: E402

PROBES = ("answers", "rates")
# Per product: columns of the operands, bytes of an element.
PRODUCTS = {"mma_bf16": (16, 2), "mma_f16": (16, 2), "mma_tf32": (8, 4)}
ROWS, COLS = 16, 8


def compile_probe(name: str, arch: str, folder: Path) -> Path:
    out = folder / name
    flags = ["-std=c++17", f"-arch=sm_{arch}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([sass.find_nvcc(), *flags, "-o", str(out), str(HERE / f"{name}.cu")], check=True)
    return out


def capability() -> str:
    """Of the first GPU, "90" for 9.0; nothing if there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.strip().replace(".", "") if done.returncode == 0 else ""


def read(folder: Path, name: str, kind: str) -> array.array:
    values = array.array(kind)
    values.frombytes((folder / f"{name}.bin").read_bytes())
    return values


def to_float(name: str, bits: int) -> float:
    """The number that an element of a product's operands stands for."""
    if name == "mma_f16":
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    return struct.unpack("<f", struct.pack("<I", bits << 16 if name == "mma_bf16" else bits & 0xFFFFE000))[0]


def nearest(exact: Fraction) -> float:
    """Rounded to float32, ties to even."""
    if exact == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(exact))) if abs(exact) < 2**1000 else 1000, -126)
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > -126 and abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    return float(round(exact / unit) * unit)


def towards_zero(exact: Fraction) -> float:
    rounded = nearest(exact)
    if abs(Fraction(rounded)) <= abs(exact):
        return rounded
    bits = struct.unpack("<I", struct.pack("<f", rounded))[0]
    return struct.unpack("<f", struct.pack("<I", bits - 1))[0]


def sums_of(folder: Path, name: str) -> dict:
    """How the results of mma compare to the exact sums, per kind of operands, and whether x y^T is y x^T."""
    k, size = PRODUCTS[name]
    kind = "H" if size == 2 else "I"
    a, b = read(folder, f"{name}_a", kind), read(folder, f"{name}_b", kind)
    c, d = read(folder, f"{name}_c", "f"), read(folder, f"{name}_d", "f")
    swapped = read(folder, f"{name}_swapped", "f")
    cases = len(d) // (ROWS * COLS)
    verdicts: dict[str, Counter] = {}
    symmetric = compared = 0
    for case in range(cases):
        base = case * ROWS * COLS
        counter = verdicts.setdefault(f"kind {case % 8}", Counter())
        for i in range(ROWS):
            x = [to_float(name, a[(case * ROWS + i) * k + s]) for s in range(k)]
            for j in range(COLS):
                result = d[base + i * COLS + j]
                if i < COLS:
                    other = swapped[base + j * COLS + i]
                    compared += 1
                    symmetric += struct.pack("<f", result) == struct.pack("<f", other)
                y = [to_float(name, b[(case * COLS + j) * k + s]) for s in range(k)]
                terms = [*x, *y, c[base + i * COLS + j]]
                if not all(map(math.isfinite, terms)):
                    counter["not finite"] += 1
                    continue
                exact = sum(
                    (Fraction(p) * Fraction(q) for p, q in zip(x, y, strict=True)), Fraction(terms[-1])
                )
                if result == nearest(exact):
                    counter[
                        "rounded to nearest" if nearest(exact) != towards_zero(exact) else "exact or alike"
                    ] += 1
                elif result == towards_zero(exact):
                    counter["cut off"] += 1
                else:
                    counter["another"] += 1
    return {
        "cases": cases,
        "symmetric": f"{symmetric} of {compared}",
        "sums": {kind: dict(counter) for kind, counter in sorted(verdicts.items())},
    }


def answers(probe: Path, output: Path) -> dict:
    subprocess.run([str(probe), str(output)], check=True)
    files = {"ldmatrix": "uint32 [2][32][4]: x4, then x4.trans; per lane its registers"}
    for name in ("exp2", "to_bf16", "to_f16", "to_tf32", "pack_bf16x2", "pack_f16x2"):
        files[name] = (
            "uint32 [16384]: the answer to the bits of a float32 u << 16 | (u * 40503 + 12345) & 0xffff, "
            "u = 4 i"
        )
        files[f"{name}_sums"] = (
            "uint64 [16]: sum over inputs of upper bits [4096 i, 4096 (i + 1)) of answer * (2 input + 1), "
            "0 for NaN"
        )
    files["exp2_errors"] = "float64 [512]: ulp, at inputs of upper bits [128 i, 128 (i + 1))"
    for name, (k, size) in PRODUCTS.items():
        element = f"uint{8 * size}"
        files[f"{name}_a"] = f"{element} [cases][{ROWS}][{k}]"
        files[f"{name}_b"] = f"{element} [cases][{COLS}][{k}]"
        files[f"{name}_c"] = files[f"{name}_d"] = f"float32 [cases][{ROWS}][{COLS}]"
        files[f"{name}_swapped"] = (
            f"float32 [cases][{ROWS}][{COLS}]: rows of b, then zeros, times rows 0-7 of a"
        )
    worst = max(read(output, "exp2_errors", "d"))
    return {"files": files, "products": {n: sums_of(output, n) for n in PRODUCTS}, "exp2_worst_ulp": worst}


def products() -> list[dict]:
    """Library products with float32 results, as the panels of wide embeddings would use them."""
    try:
        import torch
    except ImportError:
        print("no torch: library products are left out")
        return []
    if not torch.cuda.is_available():
        print("torch has no GPU: library products are left out")
        return []
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        for n in (4096, 16384):
            for k in (128, 256, 384, 512, 768, 1024):
                x = torch.randn(n, k, device="cuda").to(dtype)
                y = torch.randn(n, k, device="cuda").to(dtype)
                row = {"dtype": str(dtype).removeprefix("torch."), "m": n, "n": n, "k": k}
                try:
                    work = lambda x=x, y=y: torch.mm(x, y.t(), out_dtype=torch.float32)  # noqa: E731
                    work()
                except (TypeError, RuntimeError) as reason:
                    rows.append(row | {"failed": str(reason).splitlines()[0]})
                    continue
                times = []
                for _ in range(10):
                    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    work()
                    stop.record()
                    torch.cuda.synchronize()
                    times.append(start.elapsed_time(stop) * 1e-3)
                best = min(times)
                rows.append(row | {"seconds": best, "tflops": 2 * n * n * k / best * 1e-12})
    return rows


def rates(probe: Path) -> dict:
    return json.loads(subprocess.run([str(probe)], check=True, capture_output=True, text=True).stdout)


def write_parts(parts: dict[str, Callable[[], object]], output: Path) -> list[str]:
    """Each part's answer in a file of its name; the names of those that failed, which stop no other."""
    failed = []
    for name, ask in parts.items():
        try:
            found = ask()
        except Exception as error:
            said = getattr(error, "stderr", None) or error
            print(f"gpu_probe: {name} failed: {said}", flush=True)
            failed.append(name)
            continue
        (output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        shown = found["products"] if name == "answers" else found
        print(json.dumps({name: shown}, indent=1), flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "bench/out/gpu_probe")
    parser.add_argument("--compile-only", action="store_true")
    args = parser.parse_args()

    arch = "" if args.compile_only else capability()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not arch:
            for target in ("80", "90"):
                for probe in PROBES:
                    compile_probe(probe, target, folder)
            print(
                "gpu_probe: compiled for sm_80 and sm_90" + ("" if args.compile_only else "; no GPU: not run")
            )
            return 0
        args.output.mkdir(parents=True, exist_ok=True)
        parts = {
            "rates": lambda: rates(compile_probe("rates", arch, folder)),
            "products": products,
            "answers": lambda: answers(compile_probe("answers", arch, folder), args.output),
        }
        failed = write_parts(parts, args.output)
    print(f"gpu_probe: {', '.join(parts)}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
