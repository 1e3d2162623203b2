"""How large an error may be: as plain PyTorch's in the same dtype against float64, times a small factor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import clce_ext
from python_tests import reference

LOSS_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
# A single run of plain PyTorch may be lucky: its error counts for at least this many roundings.
ROUNDINGS = 8.0
FLOAT64_TOLERANCE = 1e-9


@dataclass
class Case:
    """Inputs in float64 and the options of one call; ``grad`` weighs the losses of reduction "none"."""

    embeddings: Tensor
    labels: Tensor | None = None
    keys: Tensor | None = None
    key_labels: Tensor | None = None
    temperature: float = 0.5
    options: dict = field(default_factory=dict)
    grad: Tensor | None = None

    def __str__(self) -> str:
        keys = None if self.keys is None else tuple(self.keys.shape)
        return f"embeddings {tuple(self.embeddings.shape)}, keys {keys}, t={self.temperature}, {self.options}"


def run(function, case: Case, dtype: torch.dtype, device: str, learn: bool = True) -> dict[str, Tensor]:
    """The loss and its gradients by everything that can have one, in float64 on the CPU; with ``learn`` the
    temperature too.
    """
    leaf = lambda x: x.detach().to(device, dtype).clone().requires_grad_()  # noqa: E731
    place = lambda x: None if x is None else x.to(device)  # noqa: E731
    inputs = {"embeddings": leaf(case.embeddings)}
    if case.keys is not None:
        inputs["keys"] = leaf(case.keys)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    if learn:
        inputs["temperature"] = torch.tensor(case.temperature, dtype=acc, device=device, requires_grad=True)
    loss = function(
        inputs["embeddings"],
        place(case.labels),
        keys=inputs.get("keys"),
        key_labels=place(case.key_labels),
        temperature=inputs.get("temperature", case.temperature),
        **case.options,
    )
    weighted = loss if case.grad is None else (loss * case.grad.to(loss)).sum()
    grads = torch.autograd.grad(weighted, list(inputs.values()))
    results = {"loss": loss, **dict(zip(inputs, grads, strict=True))}
    return {name: value.detach().double().cpu() for name, value in results.items()}


def rounded_to(case: Case, dtype: torch.dtype) -> Case:
    """The case whose float64 inputs are exactly those that the dtype can hold."""
    held = lambda x: None if x is None else x.to(dtype).double()  # noqa: E731
    temperature = case.temperature
    if dtype != torch.float64:
        temperature = torch.tensor(temperature, dtype=torch.float32).item()
    return Case(
        held(case.embeddings),
        case.labels,
        held(case.keys),
        case.key_labels,
        temperature,
        case.options,
        case.grad,
    )


def check(case: Case, dtype: torch.dtype, device: str = "cpu", luck: bool = False) -> None:
    """Asserts that the loss and every gradient are about as accurate as plain PyTorch's; with ``luck``, of
    16 bits and few anchors too, where plain PyTorch's roundings of rows may happen to cancel."""
    case = rounded_to(case, dtype)
    # A temperature that lies on a GPU is not known: its kernels take the general path, a number's may not.
    ours = [
        run(clce_ext.hard_negative_contrastive_loss, case, dtype, device, learn)
        for learn in ([True] if device == "cpu" else [True, False])
    ]
    truth = run(reference.hard_negative_contrastive_loss, case, torch.float64, "cpu")
    plain = run(reference.hard_negative_contrastive_loss, case, dtype, device)
    for name, value in (item for results in ours for item in results.items()):
        assert value.shape == truth[name].shape, f"{name}: shape {tuple(value.shape)}, {case}"
        assert value.isfinite().all(), f"{name} is not finite: {case}"
        error = (value - truth[name]).norm()
        if dtype == torch.float64:
            allowed = FLOAT64_TOLERANCE * truth[name].norm().clamp_min(1e-3)
            if name == "temperature":  # its terms may cancel
                allowed = FLOAT64_TOLERANCE * terms_of_temperature(case).clamp_min(1e-3)
        elif name == "loss":
            allowed = LOSS_FACTOR * usual_loss_error(case, dtype, device)
            if luck and torch.finfo(dtype).bits == 16:
                logits = (1 + case.options.get("beta", 1.0)) / case.temperature
                one_rounding = torch.finfo(dtype).eps / 2 * logits / case.embeddings.shape[-1] ** 0.5
                weights = {"none": value.numel() ** 0.5, "sum": case.embeddings.shape[:-1].numel(), "mean": 1}
                allowed = torch.maximum(
                    allowed, torch.tensor(one_rounding * weights[case.options["reduction"]])
                )
        else:
            size = terms_of_temperature(case) if name == "temperature" else truth[name].norm()
            # Where plain PyTorch's is not finite (float16, often), a few roundings must do.
            plain_error = (plain[name] - truth[name]).norm().nan_to_num(nan=0.0, posinf=0.0)
            usual = torch.maximum(plain_error, roundings(case, dtype) * size)
            nothing = torch.finfo(torch.float32).eps * unit_gradient(case)
            # Every anchor leaves its own, where plain PyTorch's may all be exactly zero.
            if luck and case.grad is not None:
                nothing *= max(1.0, float(case.grad.norm()))
            allowed = GRADIENT_FACTOR * usual + nothing
        assert error <= allowed, f"{name}: error {error:.3e} > {allowed:.3e}, {dtype}, {case}"


def roundings(case: Case, dtype: torch.dtype) -> float:
    """A few roundings of the dtype, or what one float32 rounding of a logit does to e^((1 + beta) s)."""
    few = ROUNDINGS * torch.finfo(dtype).eps / (1 if dtype == torch.float32 else 8)
    logits = (1 + case.options.get("beta", 1.0)) / case.temperature
    return max(few, torch.finfo(torch.float32).eps * logits)


def usual_loss_error(case: Case, dtype: torch.dtype, device: str) -> Tensor:
    """Plain PyTorch's error anchor by anchor, reduced without the luck of errors that cancel."""
    reduction = case.options.get("reduction", "mean")
    each = replace(
        case, options=case.options | {"reduction": "none"}, grad=torch.ones(1, dtype=torch.float64)
    )
    truth = run(reference.hard_negative_contrastive_loss, each, torch.float64, "cpu")["loss"]
    plain = run(reference.hard_negative_contrastive_loss, each, dtype, device)["loss"]
    terms = (truth != 0).sum().clamp_min(1)
    # Where plain PyTorch's is not finite (lengths beyond float16), a few roundings of the dtype must do.
    few = roundings(case, dtype) * truth.abs().clamp_min(1)
    error = torch.where(plain.isfinite(), (plain - truth).abs(), few)
    # An anchor's loss is a logarithm: it cannot be exact to more than a few roundings of 1 (or of itself).
    floor = roundings(case, torch.float32) * truth.abs().clamp_min(1)
    if reduction == "none":
        return torch.maximum(error.norm(), floor.norm())
    total = torch.maximum(error.sum(), floor.sum())
    return total if reduction == "sum" else total / terms


def unit_gradient(case: Case) -> float:
    """A gradient of 1 at one logit, seen at an embedding: where all is alike, roundings of 1 - 1 are left."""
    lengths = [x.norm(dim=-1).min() for x in (case.embeddings, case.keys) if x is not None and x.numel()]
    shortest = min((float(length) for length in lengths if length > 0), default=1.0)
    normalized = case.options.get("normalize", True)
    return max(1.0, 1 / case.temperature / (shortest if normalized else 1.0))


def terms_of_temperature(case: Case) -> Tensor:
    """Size of the terms of a temperature's gradient, sum_ij G_ij s_ij / t: an anchor's G sum to about 1."""
    largest = 1.0
    if not case.options.get("normalize", True):
        lengths = [x.norm(dim=-1).max() for x in (case.embeddings, case.keys) if x is not None and x.numel()]
        largest = max((float(length) for length in lengths), default=0.0) ** 2
    anchors = case.embeddings.shape[:-1].numel()
    weights = {"mean": 1.0, "sum": anchors, "none": 0 if case.grad is None else float(case.grad.abs().sum())}
    terms = weights[case.options.get("reduction", "mean")] * largest / case.temperature**2
    return torch.tensor(terms, dtype=torch.float64)
