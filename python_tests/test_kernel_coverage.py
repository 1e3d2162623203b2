"""tools/kernel_coverage.py finds what the C++ tests have left out of a kernel."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import kernel_coverage

KERNELS = {"f1": "forward_kernel<A>", "f2": "forward_kernel<B>", "m": "merge_kernel<float>"}
COLUMNS = ("blocks", "tiles", "steps", "several_step_tiles", "wraps", "partial_rows", "partial_columns")


def walked(**changes):
    return dict(zip(COLUMNS, (4, 3, 2, 3, 2, 1, 1), strict=True)) | changes


def everything():
    return {"f1": walked(), "f2": walked(), "m": walked(tiles=0, steps=0, several_step_tiles=0, wraps=0)}


def find(runs, **exceptions):
    return kernel_coverage.find_gaps(KERNELS, runs, exceptions.get("exceptions", {}))


def test_nothing_left_out():
    assert find(everything()) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"blocks": 1}, "several blocks"),
        ({"several_step_tiles": 1}, "several tiles of several steps"),
        ({"wraps": 1}, "twice round the ring"),
        ({"partial_rows": 0}, "partial rows"),
        ({"partial_columns": 0}, "partial columns"),
    ],
)
def test_one_thing_left_out(change, what):
    runs = everything() | {"f2": walked(**change)}
    (gap,) = find(runs)
    assert gap.startswith(f"forward_kernel<B>: never {what} (")
    # It may be left out where it is an exception, and only there.
    assert find(runs, exceptions={("forward_kernel<B", what): "reason"}) == []
    assert len(find(runs, exceptions={("forward_kernel<A", what): "reason"})) == 2


def test_kernel_that_never_ran():
    runs = everything()
    del runs["m"]
    assert find(runs) == ["merge_kernel<float>: never ran"]


def test_kernel_that_always_left_at_once():
    runs = everything() | {"f2": dict.fromkeys(COLUMNS, 0) | {"blocks": 4}}
    assert len(find(runs)) == 4


def test_kernel_with_a_ring_that_counts_no_tiles():
    runs = everything() | {"m": walked(tiles=0, several_step_tiles=0)}
    (gap,) = find(runs)
    assert gap.startswith("merge_kernel<float>: never several tiles of several steps")


def test_nothing_counted():
    runs = {symbol: numbers | {"tiles": 0, "wraps": 0} for symbol, numbers in everything().items()}
    assert find(runs) == ["no kernel walked over tiles"]


def test_files_are_added_up(tmp_path):
    paths = [tmp_path / "a.tsv", tmp_path / "b.tsv"]
    header = "\t".join(("kernel", *COLUMNS)) + "\n"
    paths[0].write_text(header + "f1\t4\t1\t2\t3\t0\t1\t0\n")
    paths[1].write_text(header + "f1\t2\t3\t1\t0\t5\t0\t0\nm\t1\t0\t0\t0\t0\t0\t0\n")
    runs = kernel_coverage.read_runs(paths)
    assert list(runs["f1"].values()) == [4, 3, 2, 3, 5, 1, 0]
    assert runs["m"]["blocks"] == 1


def test_short_names():
    name = (
        "void clce::cuda::forward_kernel<clce::cuda::Traits<clce::ptx::bf16, 2> >(clce::cuda::Traits::Params)"
    )
    assert kernel_coverage.KERNEL.match(name)
    assert kernel_coverage.short_name(name) == "forward_kernel<Traits<bf16, 2> >"
    assert not kernel_coverage.KERNEL.match("void clce::cuda::launch<int>(void (*)(int))")
