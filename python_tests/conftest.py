from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch

import clce_ext
from clce_ext import backends

DEVICES = ["cpu"]
if torch.cuda.is_available() and clce_ext.build_info()["cuda"]:
    DEVICES.append("cuda")


@pytest.fixture(params=[*DEVICES, "portable"])
def device(request) -> Iterator[str]:
    """Every device that this build and this machine can run; and the CPU with its kernels switched off."""
    if request.param != "portable":
        yield request.param
        return
    with backends.engine("portable"):
        yield "cpu"


@pytest.fixture(params=[None, "portable"], ids=["kernels", "portable"])
def engine(request) -> Iterator[str | None]:
    """For tests of the CPU alone: with its kernels, and without."""
    with backends.engine(request.param):
        yield request.param


@pytest.fixture(scope="session", autouse=True)
def own_compiled_code(tmp_path_factory):
    """torch.compile keeps what it made in a folder of the user, and finds it again by the names of operators:
    what another version of them left there must not be what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def own_seed(request):
    """Every test has random inputs of its own, the same at every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
