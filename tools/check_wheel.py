#!/usr/bin/env python3
"""Lists what the library in a wheel takes from others; fails where a torch or a Linux may lack it.

    python tools/check_wheel.py dist/clce_ext-*.whl [--symbols]

Allowed are torch's stable ABI as of the version that setup.py aims at, the C and C++ runtimes, BLAS (weak,
for where there is one). The stable ABI is read from the headers of the installed torch: what they declare
where TORCH_TARGET_VERSION is that version.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = re.search(r"^OLDEST_TORCH = \((\d+), (\d+)\)", (ROOT / "setup.py").read_text(), re.M).groups()
SHIMS = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
LIBRARIES = {
    "torch": r"libtorch(_cpu)?\.so",
    "runtime": r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux.*)\.so[.\d]*",
}
RUNTIME = re.compile(
    r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$|^(_ITM_(de)?registerTMCloneTable|__gmon_start__|__cxa_finalize)$"
)
BLAS = {"sgemm_", "dgemm_", "MKL_Set_Num_Threads_Local", "cublasGemmEx"}


def stable_abi(include: Path) -> set[str]:
    """The functions that torch declares for extensions which aim at the oldest torch."""
    major, minor = map(int, OLDEST_TORCH)
    target = f"0x{major << 56 | minor << 48:016x}"
    text = "".join(f"#include <{shim}>\n" for shim in SHIMS)
    command = ["c++", "-E", "-P", "-x", "c++", "-std=c++17", f"-I{include}", "-DUSE_CUDA"]
    command += [f"-DTORCH_TARGET_VERSION={target}", "-"]
    declared = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\b(?:aoti_)?torch_\w+(?=\()", declared))


def undefined_symbols(library: Path) -> list[tuple[str, bool]]:
    """Names with their versions, and whether each is weak."""
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    return [
        (line.split()[-1], line.split()[-2] in "wv") for line in listed.stdout.splitlines() if line.strip()
    ]


def kind_of(symbol: str, weak: bool, abi: set[str]) -> str:
    if symbol in abi:
        return "stable ABI"
    if RUNTIME.search(symbol):
        return "C and C++ runtime"
    return "BLAS" if symbol in BLAS and weak else "elsewhere"


def needed_libraries(library: Path) -> list[str]:
    listed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", listed)


def check(library: Path, include: Path, show: bool = False) -> list[str]:
    """Prints what the library takes; returns what is wrong."""
    abi = stable_abi(include)
    kinds = {symbol: kind_of(symbol, weak, abi) for symbol, weak in undefined_symbols(library)}
    for kind, count in sorted(Counter(kinds.values()).items()):
        print(f"{count:4} from {kind}")
        if show or kind == "elsewhere":
            print(*(f"       {symbol}" for symbol in sorted(kinds) if kinds[symbol] == kind), sep="\n")
    needed = needed_libraries(library)
    print("libraries:", *needed)
    wrong = [f"symbol {symbol}" for symbol, kind in kinds.items() if kind == "elsewhere"]
    allowed = re.compile("|".join(LIBRARIES.values()))
    return wrong + [f"library {name}" for name in needed if not allowed.fullmatch(name)]


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a wheel, or the library itself")
    parser.add_argument("--symbols", action="store_true", help="list every symbol")
    args = parser.parse_args()
    include = Path(torch.__file__).parent / "include"
    if args.file.suffix != ".whl":
        wrong = check(args.file, include, args.symbols)
    else:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(args.file) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".so")]
            wrong = [] if len(names) == 1 else [f"{len(names)} libraries, not one"]
            for name in names:
                wrong += check(Path(wheel.extract(name, folder)), include, args.symbols)
            if args.file.name.split("-")[2:4] != ["py3", "none"]:
                wrong.append(f"the tag of {args.file.name}: it is for one Python alone")
    print(*(f"not allowed: {what}" for what in wrong), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
