"""One library for every torch and every Python; builds that cannot be say why."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clce_ext
from clce_ext import compiled

ROOT = Path(clce_ext.__file__).parent.parent
INCLUDE = Path(torch.__file__).parent / "include"
sys.path.insert(0, str(ROOT / "tools"))

import check_wheel  # noqa: E402

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="an installation, no sources")


@pytest.mark.skipif(compiled.C is None or sys.platform != "linux", reason="no library to look at")
def test_library_takes_nothing_but_the_stable_abi():
    assert check_wheel.check(compiled.PATH, INCLUDE) == []
    needed = check_wheel.needed_libraries(compiled.PATH)
    assert not any("python" in name or "c10" in name or "cudart" in name for name in needed)


def test_symbols_from_elsewhere_are_found():
    abi = check_wheel.stable_abi(INCLUDE)
    assert {"torch_call_dispatcher", "torch_parallel_for", "aoti_torch_get_data_ptr"} <= abi
    assert "torch_from_blob" not in abi  # which came with torch 2.11
    kinds = {
        "torch_call_dispatcher": "stable ABI",
        "torch_from_blob": "elsewhere",
        "_ZN2at4_ops9mm_out": "elsewhere",
        "PyErr_SetString": "elsewhere",
        "memcpy@GLIBC_2.14": "C and C++ runtime",
        "sgemm_": "elsewhere",  # it must be weak
    }
    assert {symbol: check_wheel.kind_of(symbol, False, abi) for symbol in kinds} == kinds
    assert check_wheel.kind_of("sgemm_", True, abi) == "BLAS"


def build(before: str) -> str:
    """What setup.py says in a process where ``before`` has run."""
    script = f"import sys, runpy\n{before}\nsys.argv = ['setup.py', '--version']\nrunpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


@needs_sources
def test_build_with_an_old_setuptools_says_so():
    said = build("import setuptools; setuptools.__version__ = '65.5.0'")
    assert re.fullmatch(
        r"clce_ext needs setuptools 77 or later to build, this is 65\.5\.0: pip install .*", said
    )


@needs_sources
def test_build_without_torch_says_so():
    said = build("sys.modules['torch'] = None")
    assert said.endswith("install torch first, and build with --no-build-isolation")


@needs_sources
def test_build_without_cuda_that_was_asked_for_says_so():
    said = build("import os, torch; os.environ['CLCE_CUDA'] = '1'; torch.version.cuda = None")
    assert "CLCE_CUDA=1 but CUDA kernels cannot be built: torch" in said
