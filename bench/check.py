"""Nothing is timed that does not compute the same: loss and gradients against float64."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.cases import Case, Inputs, make_inputs
from bench.competitors import COMPETITORS, Competitor, Loss

# Largest relative error of the gradient. Wide enough for plain PyTorch, which normalises and multiplies in
# the input's dtype; a wrong formula is wrong by far more.
TOLERANCE = {"float64": 1e-9, "float32": 2e-4, "float16": 2e-2, "bfloat16": 8e-2}
TF32_TOLERANCE = 2e-2


class Disagreement(Exception):
    """A competitor's loss or gradient is not the reference's."""


def step(loss: Loss, inputs: Inputs) -> tuple[float, list[torch.Tensor]]:
    value = loss(inputs)
    return value.item(), list(torch.autograd.grad(value, inputs.leaves))


def relative_error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    difference = sum((a.double() - b.double()).square().sum() for a, b in zip(got, expected, strict=True))
    return (difference / sum(b.double().square().sum() for b in expected)).sqrt().item()


class Checker:
    """Checks each competitor once per problem, dtype and D, at the case's size or at ``largest`` rows."""

    def __init__(self, largest: int):
        self.largest = largest
        self._done: dict[tuple, dict] = {}
        self._expected: dict[tuple, tuple[float, list[torch.Tensor]]] = {}

    def _reference(
        self, competitor: Competitor, case: Case, inputs: Inputs
    ) -> tuple[float, list[torch.Tensor]]:
        truth = competitor.truth or COMPETITORS["chunked"].build  # in slabs, which need no B x B of float64
        if (case, truth) not in self._expected:
            self._expected = {key: value for key, value in self._expected.items() if key[0] == case}
            wide = replace(case, dtype="float64")
            self._expected[case, truth] = step(truth(wide), inputs.to(torch.float64))
        return self._expected[case, truth]

    def __call__(self, competitor: Competitor, case: Case, loss: Loss, inputs: Inputs) -> dict:
        """``loss_error`` and ``grad_error``, relative; raises Disagreement."""
        key = (competitor.name, replace(case, batch=0))
        if key in self._done:
            return self._done[key]
        if case.batch > self.largest:
            case = replace(case, batch=self.largest)
            loss, (inputs,) = competitor.build(case), make_inputs(case)
        expected_loss, expected_grads = self._reference(competitor, case, inputs)
        value, grads = step(loss, inputs)
        errors = {
            "loss_error": abs(value - expected_loss) / max(abs(expected_loss), 1e-12),
            "grad_error": relative_error(grads, expected_grads),
        }
        tolerance = TOLERANCE[case.dtype]
        if case.dtype == "float32" and (competitor.tf32 or _tf32(case)):
            tolerance = TF32_TOLERANCE
        if not all(error <= tolerance for error in errors.values()):  # a NaN is no agreement
            raise Disagreement(
                f"differs from float64: loss by {errors['loss_error']:.1e}, gradient by "
                f"{errors['grad_error']:.1e}, accepted {tolerance:.0e}"
            )
        self._done[key] = errors
        return errors


def _tf32(case: Case) -> bool:
    return case.device.startswith("cuda") and torch.backends.cuda.matmul.allow_tf32
