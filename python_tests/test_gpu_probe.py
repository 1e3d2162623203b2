"""tools/gpu_probe: it compiles, and what it says about sums is right for sums that are known."""

from __future__ import annotations

import array
import random
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path[:0] = [str(TOOLS), str(TOOLS / "gpu_probe")]

import run as probe  # noqa: E402
import sass  # noqa: E402


def float32(x: float) -> float:
    return struct.unpack("<f", struct.pack("<f", x))[0]


def test_rounding():
    for exact in (
        Fraction(1),
        Fraction(1, 3),
        Fraction(-(2**24) - 1),
        Fraction(10**9 + 7, 2**60),
        Fraction(2, 7),
    ):
        assert probe.nearest(exact) == float32(float(exact))
        cut = probe.towards_zero(exact)
        assert abs(Fraction(cut)) <= abs(exact) < abs(Fraction(cut)) * (1 + Fraction(1, 2**22))
    assert probe.nearest(Fraction(2**25 + 2)) == 2**25  # a tie, to even
    assert probe.towards_zero(Fraction(2**25 + 3)) == 2**25
    assert probe.nearest(Fraction(0)) == probe.towards_zero(Fraction(0)) == 0


@pytest.mark.parametrize(
    ("rounding", "verdict"), [(probe.nearest, "rounded to nearest"), (probe.towards_zero, "cut off")]
)
def test_verdicts_on_known_sums(tmp_path: Path, rounding, verdict: str):
    """Files as answers.cu writes them, by a chip whose arithmetic is known."""
    generator = random.Random(0)
    k, rows, cols, cases = 16, probe.ROWS, probe.COLS, 8

    def bfloat16() -> int:
        return generator.randrange(0x3D00, 0x4100) | generator.randrange(2) << 15

    def times(x: list[int], y: list[int]) -> Fraction:
        values = [[Fraction(probe.to_float("mma_bf16", bits)) for bits in row] for row in (x, y)]
        return sum((p * q for p, q in zip(*values, strict=True)), Fraction(0))

    files = {name: array.array("H" if name in "ab" else "f") for name in ("a", "b", "c", "d", "swapped")}
    for _ in range(cases):
        a = [[bfloat16() for _ in range(k)] for _ in range(rows)]
        b = [[bfloat16() for _ in range(k)] for _ in range(cols)]
        for name, matrix in (("a", a), ("b", b)):
            for row in matrix:
                files[name].extend(row)
        files["c"].extend([0.0] * rows * cols)
        files["d"].extend(rounding(times(x, y)) for x in a for y in b)
        files["swapped"].extend(rounding(times(y, x)) for y in b for x in a[:cols])
        files["swapped"].extend([0.0] * (rows - cols) * cols)
    for name, values in files.items():
        (tmp_path / f"mma_bf16_{name}.bin").write_bytes(values.tobytes())
    found = probe.sums_of(tmp_path, "mma_bf16")
    assert found["symmetric"] == f"{cases * 64} of {cases * 64}"
    total: dict[str, int] = {}
    for counts in found["sums"].values():
        for name, n in counts.items():
            total[name] = total.get(name, 0) + n
    assert set(total) <= {verdict, "exact or alike"}
    assert total[verdict] > cases * rows * cols / 4


def test_a_part_that_fails_stops_no_other(tmp_path: Path, capsys):
    def wrong():
        raise ValueError("no such chip")

    parts = {
        "rates": lambda: {"clock": 1},
        "products": wrong,
        "answers": lambda: {"products": {}, "files": {}},
    }
    assert probe.write_parts(parts, tmp_path) == ["products"]
    assert {path.name for path in tmp_path.iterdir()} == {"rates.json", "answers.json"}
    assert "products failed: no such chip" in capsys.readouterr().out


def test_it_compiles():
    try:
        sass.find_nvcc()
    except SystemExit as reason:
        pytest.skip(str(reason))
    command = [sys.executable, str(TOOLS / "gpu_probe/run.py"), "--compile-only"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compiled" in done.stdout
