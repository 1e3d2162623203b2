"""The records of clce_ext.arguments name what the ops take and return, in the order of the schemas."""

from __future__ import annotations

import inspect

import pytest
import torch

import clce_ext
from clce_ext import arguments

RECORDS = {
    "contrastive_loss": (arguments.ContrastiveLossInputs, arguments.ContrastiveLossOutputs),
    "contrastive_loss_backward": (arguments.ContrastiveLossBackwardInputs, None),
    "statistics": (arguments.StatisticsInputs, None),
    "loss_from_statistics": (arguments.LossFromStatisticsInputs, arguments.LossFromStatisticsOutputs),
    "statistics_backward": (arguments.StatisticsBackwardInputs, arguments.StatisticsBackwardOutputs),
}


@pytest.mark.parametrize("op", RECORDS)
def test_records_are_the_schemas(op):
    schema = getattr(torch.ops.clce_ext, op).default._schema
    inputs, outputs = RECORDS[op]
    assert inputs._fields == tuple(argument.name for argument in schema.arguments)
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    assert inputs._field_defaults == defaults
    if outputs is not None:
        assert outputs._fields == tuple(value.name for value in schema.returns)


def test_rows_have_the_extensions_names():
    x, labels = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    options = arguments.DEFAULTS._asdict()
    inputs = arguments.ContrastiveLossInputs(
        x,
        labels,
        None,
        None,
        temperature_tensor=None,
        debias_tensor=None,
        views=1,
        key_offset=None,
        **options,
    )
    outputs = arguments.ContrastiveLossOutputs(*clce_ext.HardNegativeContrastiveFunction.apply(*inputs))
    rows, by = arguments.Statistics(*outputs.statistics), arguments.Derivatives(*outputs.derivatives)
    assert rows.n_pos.tolist() == [1] * 4 and rows.n_neg.tolist() == [2] * 4
    torch.testing.assert_close(rows.sum_pos[0], torch.dot(outputs.z[0], outputs.z[1]) / 0.5)
    torch.testing.assert_close(rows.lse_pos, rows.sum_pos)
    assert by.sum_pos.tolist() == [-1] * 4 and not by.scale.any()
    assert outputs.z.shape[1] == arguments.ROW_PADDING


def test_one_set_of_defaults():
    """The function, the module and the record have the same options with the same defaults."""
    options = arguments.DEFAULTS._asdict()

    def defaults(call):
        return {name: p.default for name, p in inspect.signature(call).parameters.items() if name in options}

    assert defaults(clce_ext.hard_negative_contrastive_loss) == options
    assert defaults(clce_ext.HardNegativeContrastiveLoss) == options
    assert clce_ext.HardNegativeContrastiveLoss().options.items() >= options.items()
    options = arguments.CLCE_DEFAULTS._asdict()
    assert defaults(clce_ext.clce_loss) == defaults(clce_ext.CLCELoss) == options
