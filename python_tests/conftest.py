from __future__ import annotations

import zlib

import pytest
import torch

import clce_ext

DEVICES = ["cpu"]
if torch.cuda.is_available() and clce_ext.build_info()["cuda"]:
    DEVICES.append("cuda")


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """Every device that this build and this machine can run."""
    return request.param


@pytest.fixture(autouse=True)
def own_seed(request):
    """Every test has random inputs of its own, the same at every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
