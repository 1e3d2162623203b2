"""The backend in plain torch operations, for devices that this installation has no kernels for.

It computes what the compiled backends compute, as they do: many rows ordered by label, so that nearly all
panels of logits hold negatives only; of self-contrast only the panels on and above the diagonal, each for
both its sides. A panel is the largest thing that it holds, but for a small problem's logits: memory is
O(B D) and a constant.

    rows.py      embeddings to rows of length 1, and their gradients back
    panels.py    which panels there are; a panel's logits
    kept.py      a small problem's logits, which the forward leaves to the backward
    sums.py      panels to statistics
    loss.py      statistics to losses and derivatives
    gradient.py  derivatives and panels to the gradients of rows
    ops.py       the functions above composed to the ops of torch.ops.clce_ext_backend
"""
