"""What the ops of ``torch.ops.clce_ext`` refuse: a ValueError or TypeError names the argument, what came and
what is accepted. Kernels check nothing. What ops do not see, such as the mixing weight, is checked where it
arrives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from clce_ext.arguments import (
    ContrastiveLossInputs,
    Derivatives,
    LossFromStatisticsInputs,
    Statistics,
    StatisticsBackwardInputs,
    StatisticsInputs,
    padded,
)
from clce_ext.portable.rows import acc_dtype

LARGEST_BETA = 10000  # csrc/family/loss.h says why
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def _require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(message)


def _name(dtype: torch.dtype) -> str:
    """As C++ calls it, such as Float."""
    return torch.empty(0, dtype=dtype).type().removeprefix("torch.").removesuffix("Tensor")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def check_float(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in _FLOATS:
        got = _name(tensor.dtype)
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {got}")


def _check_rows(tensor: Tensor, name: str) -> None:
    if tensor.dim() != 2:
        raise ValueError(
            f"{name} must have shape [rows, dim] (or, for embeddings, [images, views, dim]), got "
            f"{_shape(tensor)}"
        )
    if tensor.shape[1] < 1:
        raise ValueError(f"{name} must have at least one column, got shape {_shape(tensor)}")


def _check_device(tensor: Tensor, name: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on the embeddings' device {device}, got {tensor.device}")


def _check_labels(labels: Tensor, name: str, length: int, device: torch.device) -> None:
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be integers (class indices), got {_name(labels.dtype)}")
    if labels.shape != (length,):
        raise ValueError(f"{name} must have shape [{length}], one label per image, got {_shape(labels)}")
    _check_device(labels, name, device)


def check_form(summation: str, denominator: str, debias: float, reduction: str) -> None:
    if summation not in ("in", "out"):
        raise ValueError(f"summation must be 'in' or 'out', got '{summation}'")
    if denominator not in ("all", "negatives"):
        raise ValueError(f"denominator must be 'all' or 'negatives', got '{denominator}'")
    if not 0 <= debias < 1:
        raise ValueError(f"debias must be in [0, 1), got {debias:g}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got '{reduction}'")


def check_debias(tensor: Tensor, anchors: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of each anchor: as it is in the accumulation dtype of ``dtype``."""
    if tensor.shape != (anchors,):
        raise ValueError(
            f"debias must be a number or have shape [{anchors}], one for each anchor, got {_shape(tensor)}"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"debias must be a floating-point tensor, got {_name(tensor.dtype)}")
    _check_device(tensor, "debias", device)
    if _can_be_read(tensor):
        numbers = tensor.detach().to(acc_dtype(dtype))
        for anchor in torch.nonzero(~((numbers >= 0) & (numbers < 1)))[:1].flatten().tolist():
            raise ValueError(f"debias must be in [0, 1), got {numbers[anchor]:g} for anchor {anchor}")


def _can_be_read(tensor: Tensor) -> bool:
    """Elsewhere that would wait for the device, and a tensor that is only traced holds no numbers."""
    return tensor.device.type == "cpu" and not (
        torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)
    )


def check_temperature(tensor: Tensor | None, number: float, device: torch.device) -> None:
    if tensor is not None:
        if tensor.numel() != 1:
            got = _shape(tensor)
            raise ValueError(f"temperature must be a number or a tensor of one element, got shape {got}")
        if not tensor.is_floating_point():
            raise TypeError(f"temperature must be a floating-point tensor, got {_name(tensor.dtype)}")
        _check_device(tensor, "temperature", device)
        if not _can_be_read(tensor):
            return
        number = tensor.item()
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"temperature must be finite and greater than 0, got {number:g}")


def check_contrast(
    anchors: Tensor, labels: Tensor | None, keys: Tensor | None, key_labels: Tensor | None,
    temperature_tensor: Tensor | None, temperature: float, views: int, key_offset: int | None, beta: float,
) -> None:  # fmt: skip
    check_float(anchors, "embeddings")
    _check_rows(anchors, "embeddings")
    rows, device = anchors.shape[0], anchors.device
    if views < 1 or rows % views != 0:
        raise ValueError(f"views must divide the number of rows {rows}, got {views}")
    images = rows // views
    if labels is not None:
        _check_labels(labels, "labels", images, device)
    if not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be finite and at least 0, got {beta:g}")
    if beta > LARGEST_BETA:
        raise ValueError(f"beta must be at most {LARGEST_BETA}, got {beta:g}")
    check_temperature(temperature_tensor, temperature, device)
    if keys is None:
        _require(key_labels is None, "key_labels are given without keys")
        _require(key_offset is None, "key_offset is given without keys")
        _require(
            labels is not None or views >= 2 or rows == 0,
            "labels are needed unless embeddings hold at least two views per image "
            "(shape [images, views, dim]) or keys are given, got labels=None and one view",
        )
        return
    _check_rows(keys, "keys")
    check_float(keys, "keys")
    if keys.dtype != anchors.dtype:
        here, there = _name(anchors.dtype), _name(keys.dtype)
        raise TypeError(f"keys must have the embeddings' dtype {here}, got {there}")
    _check_device(keys, "keys", device)
    if keys.shape[1] != anchors.shape[1]:
        raise ValueError(
            f"keys must have the embeddings' {anchors.shape[1]} columns, got shape {_shape(keys)}"
        )
    if (labels is None) != (key_labels is None):
        given = ["None" if x is None else "a tensor" for x in (labels, key_labels)]
        raise ValueError(
            "labels and key_labels must be given together (or neither: image i pairs with key i), got "
            f"labels={given[0]}, key_labels={given[1]}"
        )
    count = keys.shape[0]
    if key_labels is not None:
        _check_labels(key_labels, "key_labels", count, device)
    else:
        if count != images:
            raise ValueError(
                f"keys must have one row per image ({images}) where neither has labels, got {count}"
            )
        _require(key_offset is None, "key_offset needs labels and key_labels")
    if key_offset is not None and not 0 <= key_offset <= count - rows:
        raise ValueError(
            f"key_offset must place all {rows} anchors inside the {count} keys, got {key_offset}"
        )


def _address(tensor: Tensor) -> int:
    """Where its memory begins, or would begin."""
    if isinstance(tensor, FakeTensor):
        return tensor.storage_offset() * tensor.element_size()
    return tensor.data_ptr()  # which may be odd where another library has allocated it


def check_prepared(z: Tensor, key_z: Tensor | None, dim: int) -> None:
    for rows, name in ((z, "z"), (key_z, "key_z")):
        if rows is None:
            continue
        if rows.dim() != 2 or rows.shape[1] != padded(dim) or not rows.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous rows as clce_ext::prepare makes them, [rows, {padded(dim)}], "
                f"got {_shape(rows)}"
            )
        # Kernels read 16 bytes at a time; torch's allocators begin at multiples of more.
        if _address(rows) % 16 != 0:
            raise ValueError(f"{name} must lie at a multiple of 16 bytes, as clce_ext::prepare makes it")


def check_rows_of(z: Tensor, tensor: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {_shape(tensor)}")
    check_float(z, "z")
    if tensor.dtype != (acc := acc_dtype(z.dtype)):
        here, there, got = _name(acc), _name(z.dtype), _name(tensor.dtype)
        raise TypeError(f"{name} must be {here} where z is {there}, got {got}")
    _check_device(tensor, name, z.device)


# ---- by op ----


def contrastive_loss(*args) -> None:
    inputs = ContrastiveLossInputs(*args)
    check_contrast(
        inputs.embeddings, inputs.labels, inputs.keys, inputs.key_labels, inputs.temperature_tensor,
        inputs.temperature, inputs.views, inputs.key_offset, inputs.beta,
    )  # fmt: skip
    check_form(inputs.summation, inputs.denominator, inputs.debias, inputs.reduction)
    if inputs.debias_tensor is not None:
        x = inputs.embeddings
        check_debias(inputs.debias_tensor, x.shape[0], x.dtype, x.device)


def prepare(x: Tensor, normalize: bool) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must have shape [rows, dim], got {_shape(x)}")
    check_float(x, "x")


def prepare_backward(dz: Tensor, z: Tensor, norms: Tensor, dim: int, normalize: bool) -> None:
    check_prepared(z, None, dim)
    check_rows_of(z, dz, "dz", tuple(z.shape))
    check_rows_of(z, norms, "norms", (z.shape[0] if normalize else 0,))


def statistics(*args) -> None:
    inputs = StatisticsInputs(*args)
    check_prepared(inputs.z, inputs.key_z, inputs.dim)
    check_contrast(
        inputs.z, inputs.labels, inputs.key_z, inputs.key_labels, inputs.temperature_tensor,
        inputs.temperature, 1, inputs.key_offset, inputs.beta,
    )  # fmt: skip


def statistics_backward(*args) -> None:
    inputs = StatisticsBackwardInputs(*args)
    statistics(*(getattr(inputs, name) for name in StatisticsInputs._fields))
    anchors = inputs.z.shape[0]
    check_rows_of(inputs.z, inputs.statistics, "statistics", (len(Statistics._fields), anchors))
    check_rows_of(inputs.z, inputs.derivatives, "derivatives", (len(Derivatives._fields), anchors))


def loss_from_statistics(*args) -> None:
    inputs = LossFromStatisticsInputs(*args)
    numbers, rows = inputs.statistics, len(Statistics._fields)
    if numbers.dim() != 2 or numbers.shape[0] != rows:
        raise ValueError(f"statistics must have shape [{rows}, anchors], got {_shape(numbers)}")
    check_float(numbers, "statistics")
    if numbers.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"statistics must be float32 or float64, got {_name(numbers.dtype)}")
    check_temperature(inputs.temperature_tensor, inputs.temperature, numbers.device)
    check_form(inputs.summation, inputs.denominator, inputs.debias, inputs.reduction)
    if inputs.debias_tensor is not None:
        check_debias(inputs.debias_tensor, numbers.shape[1], numbers.dtype, numbers.device)
