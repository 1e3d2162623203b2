"""One library for every torch and every Python; builds that cannot be say why."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from clce_ext import compiled

ROOT = Path(__file__).parent.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("an installation, no sources", allow_module_level=True)
INCLUDE = Path(torch.__file__).parent / "include"
sys.path.insert(0, str(ROOT / "tools"))

import check_wheel  # noqa: E402


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


def test_build_with_an_old_setuptools_says_so():
    said = build("import setuptools; setuptools.__version__ = '65.5.0'")
    assert re.fullmatch(
        r"clce_ext needs setuptools 77 or later to build, this is 65\.5\.0: pip install .*", said
    )


def test_build_without_torch_says_so():
    said = build("sys.modules['torch'] = None")
    assert said.endswith("install torch first, and build with --no-build-isolation")


def test_build_without_cuda_that_was_asked_for_says_so():
    said = build("import os, torch; os.environ['CLCE_CUDA'] = '1'; torch.version.cuda = None")
    assert "CLCE_CUDA=1 but CUDA kernels cannot be built: torch" in said


def test_source_distribution_holds_all_that_a_build_needs(tmp_path):
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    (archive,) = tmp_path.glob("clce_ext-*.tar.gz")
    with tarfile.open(archive) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    needed = [ROOT / name for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE")]
    needed += [path for folder in ("csrc", "clce_ext") for path in (ROOT / folder).rglob("*")]
    kept = {path for path in needed if path.is_file() and path.suffix not in (".so", ".pyc")}
    assert {path.relative_to(ROOT).as_posix() for path in kept} <= names
    assert len(kept) > 100
