#!/usr/bin/env python3
"""Breaks the code on purpose, one edge case at a time, and shows that a test notices.

Each mutation is a small change to a copy of the sources; the copy is built for the CPU and the edge-case
tests are run on it. Prints a table; fails if a mutation survives. Takes about a minute a mutation.

    python tools/mutation_check.py              all
    python tools/mutation_check.py nan eps      those whose name contains a word
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TESTS = [f"python_tests/{name}.py" for name in ("test_edge_cases", "test_arguments", "test_loss")]


@dataclass
class Mutation:
    row: str  # of the table of edge cases in docs/losses.md, or a dtype
    name: str
    file: str
    old: str
    new: str
    tests: str  # pytest -k


MUTATIONS = [
    Mutation(
        "anchor without positives", "mean over all anchors", "csrc/cpu/loss.cpp",
        "terms += term.is_term;", "terms += 1;", "anchor_without_positives",
    ),
    Mutation(
        "no anchor has a positive", "division by no terms", "csrc/cpu/loss.cpp",
        "sum / std::max(terms, 1.0)", "sum / terms", "no_anchor_has_a_positive",
    ),
    Mutation(
        "anchor without negatives", "logarithm of H = 0", "csrc/family/loss.h",
        "const bool has_negatives = s.n_neg > 0;", "const bool has_negatives = true;", "without_negatives",
    ),
    Mutation(
        "anchor without negatives", "decoupled term counted", "csrc/family/loss.h",
        "(config.negatives_only && !has_negatives)", "false", "without_negatives",
    ),
    Mutation(
        "ignore_index", "ignored rows kept", "csrc/cpu/rows.cpp",
        "label != ignore_index", "true", "ignored_images",
    ),
    Mutation(
        "zero vectors", "no eps in the norm", "csrc/backend.h",
        "constexpr double kNormEps = 1e-12;", "constexpr double kNormEps = 0;", "zero_vectors",
    ),
    Mutation(
        "zero vectors", "float16 gradient not clamped", "csrc/cpu/prepare.cpp",
        "? Acc(65504) :", "? std::numeric_limits<Acc>::max() :", "zero_vectors",
    ),
    Mutation(
        "t = 0.01", "plain sums at every temperature", "csrc/family/statistics.h",
        "return normalized && (1.0 + beta) / temperature <= kBoundedLogit;", "return normalized;",
        "low_temperature",
    ),
    Mutation(
        "NaN and Inf", "NaN taken for H on its floor", "csrc/family/loss.h",
        "if (share >= 1 || debiased <= floor) {", "if (!(share < 1 && debiased > floor)) {", "nan_and_inf",
    ),
    Mutation(
        "NaN and Inf", "NaN dropped by an exponential", "csrc/cpu/vec.h",
        "select(x.lanes < Vec<float>(kLowest).lanes,",
        "select((x.lanes < Vec<float>(kLowest).lanes) | (x.lanes != x.lanes),", "nan_and_inf",
    ),
    Mutation(
        "t = 0.01", "low parts of the logarithms forgotten", "csrc/cpu/tile_impl.h",
        "fmsub(power, s, lse) - lse_low", "fmsub(power, s, lse)", "low_temperature",
    ),
    Mutation(
        "B = 1", "own key kept", "csrc/cpu/rows.cpp",
        "if (args.has_self) {", "if (false) {", "small_and_odd or without_negatives",
    ),
    Mutation(
        "N = 0", "division by no terms", "csrc/cpu/loss.cpp",
        "sum / std::max(terms, 1.0)", "sum / terms", "no_keys",
    ),
    Mutation(
        "B no multiple of a tile", "lanes that are not there counted", "csrc/cpu/tile_impl.h",
        "return select(Vec<T>::first(count), value, Vec<T>(T(0)));", "return value;",
        "small_and_odd",
    ),
    Mutation(
        "D odd", "the last columns' squares forgotten", "csrc/cpu/prepare.cpp",
        "for (; d < count; ++d) lanes[d % kLanes] += body(d);", "", "small_and_odd",
    ),
    Mutation(
        "bfloat16", "bfloat16's bits taken for float16's", "csrc/cpu/rows.cpp",
        "with_element_type<BFloat16, Float16>", "with_element_type<Float16, Float16>",
        "several_blocks and bfloat16",
    ),
    Mutation(
        "non-contiguous", "stride of columns ignored", "csrc/cpu/prepare.cpp",
        "step = args.x_col_stride;", "step = 1;", "strides",
    ),
    Mutation(
        "expanded", "stride of rows ignored", "csrc/cpu/prepare.cpp",
        "x + i * args.x_row_stride", "x + i * args.dim", "strides",
    ),
    Mutation(
        "any integer labels", "labels not widened", "csrc/binding/calls.cpp",
        "contiguous_as(*labels, ScalarType::Long)", "labels", "label_types",
    ),
    Mutation(
        "any integer labels", "labels cut to 32 bits", "csrc/cpu/rows.cpp",
        "labels[image] : image", "static_cast<int32_t>(labels[image]) : image", "labels_of_any_size",
    ),
    Mutation(
        "t <= 0", "temperature unchecked", "clce_ext/checks.py",
        "if not (number > 0 and math.isfinite(number)):", "if False:", "temperature_below_zero",
    ),
    Mutation(
        "wrong rank", "rank unchecked", "clce_ext/checks.py",
        "if tensor.dim() != 2:", "if False:", "bad_arguments",
    ),
    Mutation(
        "label length", "length unchecked", "clce_ext/checks.py",
        "if labels.shape != (length,):", "if False:", "bad_arguments",
    ),
    Mutation(
        "float labels", "type unchecked", "clce_ext/checks.py",
        "if labels.dtype not in _INTEGERS:", "if False:", "bad_arguments",
    ),
    Mutation(
        "mixed dtypes", "keys' dtype unchecked", "clce_ext/checks.py",
        "if keys.dtype != anchors.dtype:", "if False:", "bad_arguments",
    ),
    Mutation(
        "beta < 0", "beta unchecked", "clce_ext/checks.py",
        "if not (beta >= 0 and math.isfinite(beta)):", "if False:", "bad_arguments",
    ),
    Mutation(
        "lambda outside [0, 1]", "mixing weight unchecked", "clce_ext/functional.py",
        "if not 0.0 <= weight <= 1.0:", "if False:", "bad_clce_arguments",
    ),
]  # fmt: skip


def applies(mutation: Mutation, root: Path = ROOT) -> bool:
    """Whether the code that it changes is still there (which python_tests/test_tools.py checks of all)."""
    return mutation.old in (root / mutation.file).read_text()


def run(mutation: Mutation, copy: Path) -> str:
    """ "killed", or what went wrong."""
    path = copy / mutation.file
    if not applies(mutation, copy):
        return "not applied: the source has changed"
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        environment = {**os.environ, "CLCE_CUDA": "0"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        built = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        if built.returncode:
            return "not built: " + built.stdout[-300:] + built.stderr[-300:]
        command = [sys.executable, "-m", "pytest", "-q", "-x", *TESTS]
        tested = subprocess.run([*command, "-k", mutation.tests], cwd=copy, capture_output=True, text=True)
    finally:
        path.write_text(text)
    if tested.returncode < 0:
        return "killed"  # by a signal
    return {0: "SURVIVED", 1: "killed"}.get(tested.returncode, "no test ran: " + tested.stdout[-300:])


def main() -> int:
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word.lower() in m.name.lower() for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns("build", ".git", ".venv", "runs", "*.so")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for mutation in chosen:
            result = run(mutation, copy)
            survivors += result != "killed"
            print(f"{mutation.row:26}  {mutation.name:34}  {result}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations were noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
