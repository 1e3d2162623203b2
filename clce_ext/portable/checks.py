"""What the ops refuse: the twin of ``csrc/binding/checks.cpp``, same conditions, order and words.

There are two, since these would cost callers of the kernels time, and where nothing is compiled there are
none of C++. python_tests/test_arguments.py runs its cases on both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clce_ext.arguments import Derivatives, Statistics, padded
from clce_ext.portable.rows import acc_dtype

_LARGEST_BETA = 10000  # csrc/family/loss.h says why
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
    _require(tensor.shape[1] >= 1, f"{name} must have at least one column, got shape {_shape(tensor)}")


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
    _require(summation in ("in", "out"), f"summation must be 'in' or 'out', got '{summation}'")
    _require(
        denominator in ("all", "negatives"), f"denominator must be 'all' or 'negatives', got '{denominator}'"
    )
    _require(0 <= debias < 1, f"debias must be in [0, 1), got {debias:g}")
    _require(
        reduction in ("none", "mean", "sum"), f"reduction must be 'mean', 'sum' or 'none', got '{reduction}'"
    )


def debias_of_anchors(tensor: Tensor | None, anchors: int, dtype: torch.dtype, device: torch.device):
    """[M] in the accumulation dtype of ``dtype``, or None."""
    if tensor is None:
        return None
    if tensor.shape != (anchors,):
        raise ValueError(
            f"debias must be a number or have shape [{anchors}], one for each anchor, got {_shape(tensor)}"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"debias must be a floating-point tensor, got {_name(tensor.dtype)}")
    _check_device(tensor, "debias", device)
    numbers = tensor.detach().to(acc_dtype(dtype))
    if numbers.device.type == "cpu":
        for anchor in torch.nonzero(~((numbers >= 0) & (numbers < 1)))[:1].flatten().tolist():
            raise ValueError(f"debias must be in [0, 1), got {numbers[anchor]:g} for anchor {anchor}")
    return numbers


def check_temperature(tensor: Tensor | None, number: float, device: torch.device) -> None:
    if tensor is not None:
        if tensor.numel() != 1:
            got = _shape(tensor)
            raise ValueError(f"temperature must be a number or a tensor of one element, got shape {got}")
        if not tensor.is_floating_point():
            raise TypeError(f"temperature must be a floating-point tensor, got {_name(tensor.dtype)}")
        _check_device(tensor, "temperature", device)
        if tensor.device.type != "cpu":
            return
        number = tensor.item()
    _require(
        number > 0 and math.isfinite(number), f"temperature must be finite and greater than 0, got {number:g}"
    )


def check_contrast(
    anchors: Tensor, labels: Tensor | None, keys: Tensor | None, key_labels: Tensor | None,
    temperature_tensor: Tensor | None, temperature: float, views: int, key_offset: int | None, beta: float,
) -> None:  # fmt: skip
    check_float(anchors, "embeddings")
    _check_rows(anchors, "embeddings")
    rows, device = anchors.shape[0], anchors.device
    _require(views >= 1 and rows % views == 0, f"views must divide the number of rows {rows}, got {views}")
    images = rows // views
    if labels is not None:
        _check_labels(labels, "labels", images, device)
    _require(beta >= 0 and math.isfinite(beta), f"beta must be finite and at least 0, got {beta:g}")
    _require(beta <= _LARGEST_BETA, f"beta must be at most {_LARGEST_BETA}, got {beta:g}")
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
    given = ["None" if x is None else "a tensor" for x in (labels, key_labels)]
    _require(
        given[0] == given[1],
        "labels and key_labels must be given together (or neither: image i pairs with key i), got "
        f"labels={given[0]}, key_labels={given[1]}",
    )
    count = keys.shape[0]
    if key_labels is not None:
        _check_labels(key_labels, "key_labels", count, device)
    else:
        _require(
            count == images,
            f"keys must have one row per image ({images}) where neither has labels, got {count}",
        )
        _require(key_offset is None, "key_offset needs labels and key_labels")
    _require(
        key_offset is None or 0 <= key_offset <= count - rows,
        f"key_offset must place all {rows} anchors inside the {count} keys, got {key_offset}",
    )


def check_prepared(z: Tensor, key_z: Tensor | None, dim: int) -> None:
    for rows, name in ((z, "z"), (key_z, "key_z")):
        if rows is None:
            continue
        _require(
            rows.dim() == 2 and rows.shape[1] == padded(dim) and rows.is_contiguous(),
            f"{name} must be contiguous rows as clce_ext::prepare makes them, [rows, {padded(dim)}], "
            f"got {_shape(rows)}",
        )
        # Only kernels need it; whoever breaks it shall learn so here too.
        _require(
            rows.storage_offset() * rows.element_size() % 16 == 0,
            f"{name} must lie at a multiple of 16 bytes, as clce_ext::prepare makes it",
        )


def check_rows_of(z: Tensor, tensor: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {_shape(tensor)}")
    check_float(z, "z")
    if tensor.dtype != (acc := acc_dtype(z.dtype)):
        here, there, got = _name(acc), _name(z.dtype), _name(tensor.dtype)
        raise TypeError(f"{name} must be {here} where z is {there}, got {got}")
    _check_device(tensor, name, z.device)


def check_statistics(statistics: Tensor) -> None:
    rows = len(Statistics._fields)
    if statistics.dim() != 2 or statistics.shape[0] != rows:
        raise ValueError(f"statistics must have shape [{rows}, anchors], got {_shape(statistics)}")
    check_float(statistics, "statistics")
    if statistics.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"statistics must be float32 or float64, got {_name(statistics.dtype)}")


def check_numbers_of_anchors(z: Tensor, statistics: Tensor, derivatives: Tensor) -> None:
    check_rows_of(z, statistics, "statistics", (len(Statistics._fields), z.shape[0]))
    check_rows_of(z, derivatives, "derivatives", (len(Derivatives._fields), z.shape[0]))


def check_x(x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must have shape [rows, dim], got {_shape(x)}")
    check_float(x, "x")
