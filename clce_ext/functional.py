"""The losses as functions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from clce_ext.arguments import (
    CLCE_DEFAULTS,
    DEFAULTS,
    ContrastiveLossInputs,
    Debias,
    LossOptions,
    Temperature,
)
from clce_ext.distributed.loss import TRANSPORTS, loss_of_all_ranks, name_of_call
from clce_ext.distributed.ranks import refuse, sum_over_ranks
from clce_ext.labels import check_shape, own_class_labels
from clce_ext.ops import HardNegativeContrastiveFunction, check_arguments
from clce_ext.queue import EmbeddingQueue

__all__ = ["clce_loss", "hard_negative_contrastive_loss"]


def _rows(embeddings: Tensor) -> tuple[Tensor, int]:
    """[B, V, D] -> [B * V, D] and V; [B, D] as it is, with one view."""
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"embeddings must be a tensor, got {type(embeddings).__name__}")
    if embeddings.dim() == 3:
        if embeddings.shape[1] < 1:
            raise ValueError(f"embeddings must have at least one view, got shape {tuple(embeddings.shape)}")
        return embeddings.flatten(0, 1), embeddings.shape[1]
    if embeddings.dim() != 2:
        raise ValueError(
            f"embeddings must have shape [images, dim] or [images, views, dim], got {tuple(embeddings.shape)}"
        )
    return embeddings, 1


def _refuse_non_tensors(**arguments: Tensor | None) -> None:
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")


def number(name: str, value: object) -> float:
    """Refuses what only looks like a number, such as "0.1" or True (TypeError)."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TypeError(f"{name} must be a number, got a tensor of shape {list(value.shape)}")
    # Most are of these types; what torch 2.10 puts in their place while it traces has no hasattr.
    is_number = isinstance(value, (int, float)) or hasattr(value, "__float__")
    if isinstance(value, (bool, str)) or not is_number:
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _temperature(value: float | Tensor) -> Temperature:
    return Temperature.of(value if isinstance(value, Tensor) else number("temperature", value))


def check_options(options: dict) -> None:
    """Refuses the options of :func:`hard_negative_contrastive_loss` that no images could be given with.

    Raises:
        ValueError, TypeError: as that function; unknown options, with those that are known.
    """
    known = [*LossOptions._fields, "distributed", "process_group"]
    refuse_unknown(options, known)
    given = LossOptions(**{name: options[name] for name in LossOptions._fields if name in options})
    for name in ("detach_weights", "normalize"):
        if not isinstance(getattr(given, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(given, name)!r}")
    for name in ("summation", "denominator", "reduction"):
        if not isinstance(getattr(given, name), str):
            raise TypeError(f"{name} must be a string, got {getattr(given, name)!r}")
    if not isinstance(given.ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {given.ignore_index!r}")
    transport = options.get("distributed")
    if transport not in (None, *TRANSPORTS):
        raise ValueError(f"distributed must be None, 'gather' or 'ring', got {transport!r}")
    if transport is None and options.get("process_group") is not None:
        raise ValueError("process_group is given without distributed='gather' or 'ring'")
    tensor, temperature = _temperature(given.temperature)
    if tensor is not None and not tensor.is_cpu:  # its sign is on the device
        tensor = torch.ones_like(tensor, device="cpu")
    inputs = ContrastiveLossInputs(
        embeddings=torch.zeros(0, 1, device="cpu"),
        labels=None,
        keys=None,
        key_labels=None,
        views=1,
        key_offset=None,
        **given._asdict()
        | {
            "temperature_tensor": tensor,
            "temperature": temperature,
            "beta": number("beta", given.beta),
            "debias_tensor": None,  # its shape is a batch's
            "debias": 0.0 if isinstance(given.debias, Tensor) else number("debias", given.debias),
        },
    )
    check_arguments(inputs)


def check_clce_options(options: dict) -> None:
    """As :func:`check_options`, of :func:`clce_loss`."""
    own = ("weight", "label_smoothing", "class_weights")
    refuse_unknown(options, [*own, *LossOptions._fields, "distributed", "process_group"])
    check_mixing_weight(options["weight"])
    _label_smoothing(options["label_smoothing"])
    _refuse_non_tensors(class_weights=options.get("class_weights"))
    check_options({name: value for name, value in options.items() if name not in own})


def _label_smoothing(value: float) -> float:
    value = number("label_smoothing", value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {value}")
    return value


def refuse_unknown(options: Iterable[str], known: Iterable[str]) -> None:
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise TypeError(f"unknown option {name}{meant}; accepted are {', '.join(known)}")


def _refuse(problem: Exception, distributed: str | None, process_group) -> None:
    """Raises ``problem``; with ``distributed`` on every rank."""
    if distributed is not None:
        refuse(problem, name_of_call(distributed), process_group)
    raise problem


def _debias(value: float | Tensor, anchors: int, views: int) -> Debias:
    """A tensor: one for each anchor, views of an image sharing the image's."""
    debias = Debias.of(value if isinstance(value, Tensor) else number("debias", value))
    tensor = debias.debias_tensor
    if tensor is None:
        return debias
    if tensor.requires_grad:
        raise ValueError("debias must not require grad: no gradient of it is offered")
    if tensor.dim() == 0:
        tensor = tensor.expand(anchors)
    elif tensor.dim() == 1 and tensor.shape[0] * views == anchors:
        tensor = tensor.repeat_interleave(views)
    return debias._replace(debias_tensor=tensor)


def _queue_keys(
    queue: EmbeddingQueue | None, rows: Tensor, labels: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor] | None:
    """The queue's entries as keys and their labels."""
    if queue is None:
        return None
    if not isinstance(queue, EmbeddingQueue):
        raise TypeError(f"queue must be a clce_ext.EmbeddingQueue or None, got {type(queue).__name__}")
    return queue.as_keys(rows, labels is not None, ignore_index)


def _with_queue(inputs: ContrastiveLossInputs, entries: tuple[Tensor, Tensor]) -> ContrastiveLossInputs:
    """The queue's entries as further keys, beside the given ones or the batch."""
    if not torch.compiler.is_compiling():  # now: messages are about what was given, without the entries
        check_arguments(inputs)
    rows, labels, views = inputs.embeddings, inputs.labels, inputs.views
    keys, key_labels, key_offset = inputs.keys, inputs.key_labels, inputs.key_offset
    if labels is None:
        labels = key_labels = own_class_labels(rows.shape[0] // views, inputs.ignore_index, rows.device)
    if keys is None:
        keys, key_labels, key_offset = rows, labels.repeat_interleave(views), 0
    return inputs._replace(
        labels=labels,
        keys=torch.cat([keys, entries[0]]),
        key_labels=torch.cat([key_labels.long(), entries[1]]),
        key_offset=key_offset,
    )


def hard_negative_contrastive_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    key_offset: int | None = None,
    temperature: float | Tensor = DEFAULTS.temperature,
    beta: float = DEFAULTS.beta,
    summation: str = DEFAULTS.summation,
    denominator: str = DEFAULTS.denominator,
    debias: float | Tensor = DEFAULTS.debias,
    detach_weights: bool = DEFAULTS.detach_weights,
    normalize: bool = DEFAULTS.normalize,
    ignore_index: int = DEFAULTS.ignore_index,
    reduction: str = DEFAULTS.reduction,
    queue: EmbeddingQueue | None = None,
    distributed: str | None = None,
    process_group=None,
) -> Tensor:
    r"""Label-aware contrastive loss with hard negatives weighted up.

    With :math:`z` the (normalised) embeddings, :math:`s_{ij} = z_i \cdot z_j / \tau`, the positives
    :math:`P(i)` (same label, without :math:`i`) and the negatives :math:`N(i)` (another label)::

        w_ik = |N(i)| e^(beta s_ik) / sum_{n in N(i)} e^(beta s_in)
        H_i  = sum_{k in N(i)} w_ik e^(s_ik)
        D_i  = sum_{p in P(i)} e^(s_ip) + H_i               denominator="all"
             = H_i                                          denominator="negatives"
        L_i  = -log( mean_{p in P(i)} e^(s_ip) / D_i )      summation="in"
             = -mean_{p in P(i)} ( s_ip - log D_i )         summation="out"

    Note that beta multiplies the logit s, which is already divided by the temperature.
    beta = 0 is SupCon (arXiv 2004.11362; LaCViT, 2303.18013, with ``summation="out"``); beta = 1 with
    ``"in"`` is SCHaNe (2308.14893) and the contrastive half of CLCE (2402.14551); ``debias`` > 0 is HCL
    (2010.04592); ``denominator="negatives"`` is DCL (2110.06848).

    No matrix of size B x B is ever held, but for one of at most 2**20 logits by the portable backend: memory
    is O(B D). The same input gives the same bits.

    With ``distributed``, the batch is that of all ranks: the loss is what one process computes from the
    ranks' embeddings, labels, keys and key labels laid end to end in rank order; shares may differ in
    size, or be empty. Every rank returns the whole batch's loss ("none": its own anchors' terms), "mean"
    is over all ranks' anchors, and every rank must call, and call backward, alike. *Which factor is in
    the gradients:* they are those of the sum of what the W ranks return, as in torch.distributed.nn: W
    times the whole batch's at the local embeddings and keys. DistributedDataParallel and FSDP average
    parameters' gradients over ranks, which takes the W away: the model's gradients are exactly one
    process's. The temperature's counts this rank's anchors (times W), and is exact after the same
    averaging. With ``reduction="none"`` each term is returned by one rank alone, so there is no W.

    Args:
        embeddings: [B, D], or [B, V, D] for V views of each image; float32, float64, bfloat16 or float16
            (which are accumulated in float32); any device, any strides.
        labels: [B] integers. None: every image is its own class, so that an image's other views are its
            positives (V >= 2); or, with keys and no key_labels, image i's positive is key i.
        keys: [N, D], embeddings' dtype: contrast against these instead of the batch itself.
        key_labels: [N] integers, with keys.
        key_offset: the anchors are ``keys[key_offset : key_offset + B]``, and each one's own key is left
            out. None: keys are other images.
        temperature: tau > 0, a float or a tensor of one element that may require grad. The host does not
            read a tensor on CUDA: its sign is not checked, and the logits are taken for unbounded, which is
            slower.
        beta: hardness, >= 0; 0 weighs all negatives alike.
        summation: the mean over positives inside ("in") or outside ("out") the logarithm.
        denominator: "all" keys or "negatives" only (decoupled).
        debias: HCL's tau+ in [0, 1): the share of negatives that are expected to be false; replaces H_i by
            ``max((H_i - tau+ |N(i)| mean_p e^(s_ip)) / (1 - tau+), |N(i)| e^(-1/tau))``. A number, or a
            floating-point tensor [B] (or [B * V], each anchor's own) without gradient, such as the share
            of each image's class. The host does not read a tensor on CUDA: its range is not checked.
        detach_weights: take the hardness weights w for constants in the gradient.
        normalize: divide rows by max(length, 1e-12) first, as torch.nn.functional.normalize.
        ignore_index: images with this label are neither anchors nor keys.
        reduction: "mean" over the anchors that have a loss term, "sum", or "none" for all B * V of them.
            An anchor without positives (or, decoupled, without negatives) has no term: 0 and no gradient.
        queue: an EmbeddingQueue, whose entries are keys beside the batch (or ``keys``); no gradient. It
            does not travel: with ``distributed`` each rank's anchors see their own rank's queue.
        distributed: None: this process alone. "gather": all ranks' keys at once, memory O(B D). "ring": one
            rank's keys after the other, memory O(B_local D).
        process_group: of torch.distributed, with ``distributed``; None is the default group.

    Returns:
        The loss, float32 (float64 for float64 embeddings), [] or [B * V]. Gradients flow to embeddings,
        keys and temperature; a second derivative is not offered and raises RuntimeError.

    Raises:
        ValueError, TypeError: an argument's shape, length, dtype, device or value; the message names the
            argument, what came and what is accepted. With ``distributed``, also where ranks differ in
            anything but their data, and on every rank if one rank's arguments are refused.
        RuntimeError: with ``distributed``, a rank died or did not call within the process group's timeout.
        NotImplementedError: with ``CLCE_PORTABLE=0`` in the environment, a device that this build has no
            kernels for (see ``clce_ext.build_info()``).
    """
    try:
        rows, views = _rows(embeddings)
        _refuse_non_tensors(labels=labels, keys=keys, key_labels=key_labels)
        if labels is not None:
            check_shape(labels, embeddings.shape)
        entries = _queue_keys(queue, rows, labels, ignore_index)
        temperature_tensor, temperature = _temperature(temperature)
        debias_tensor, debias = _debias(debias, rows.shape[0], views)
        beta = number("beta", beta)
    except (TypeError, ValueError) as problem:
        _refuse(problem, distributed, process_group)
    inputs = ContrastiveLossInputs(
        rows,
        labels,
        keys,
        key_labels,
        temperature_tensor,
        temperature,
        views,
        key_offset,
        beta,
        summation,
        denominator,
        debias_tensor,
        debias,
        detach_weights,
        normalize,
        ignore_index,
        reduction,
    )
    if distributed is not None:
        return loss_of_all_ranks(inputs, entries, distributed, process_group)
    if process_group is not None:
        raise ValueError("process_group is given without distributed='gather' or 'ring'")
    if entries is not None:
        inputs = _with_queue(inputs, entries)
    # The Function costs the host less; torch.compile and torch.export want the op itself.
    compiling = torch.compiler.is_compiling()
    compute = torch.ops.clce_ext.contrastive_loss if compiling else HardNegativeContrastiveFunction.apply
    loss, *_ = compute(*inputs)
    return loss


def check_mixing_weight(weight: float) -> None:
    weight = number("weight (the mixing weight lambda)", weight)
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight (the mixing weight lambda) must be in [0, 1], got {weight}")


def _cross_entropy(
    logits: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    label_smoothing: float,
    class_weights: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies, and their number or the sum of their class weights, in float32 at
    least: bfloat16 has no 257.

    Not their quotient: for no images that would be 0 / 0.
    """
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits must have shape [images, classes] or [images, views, classes], got {got}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating-point, got {logits.dtype}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    _refuse_non_tensors(targets=targets, class_weights=class_weights)
    check_shape(labels, logits.shape)
    views = logits.shape[1] if logits.dim() == 3 else 1
    flat = logits.reshape(-1, logits.shape[-1])
    if flat.dtype in (torch.bfloat16, torch.float16):
        flat = flat.float()
        class_weights = None if class_weights is None else class_weights.to(flat.dtype)
    if targets is not None:
        target = targets.reshape(-1, targets.shape[-1])
        if target.shape != flat.shape:
            shapes = f"{tuple(logits.shape)}, got {tuple(targets.shape)}"
            raise ValueError(f"targets must have the logits' shape {shapes}")
        total = F.cross_entropy(flat, target, class_weights, label_smoothing=label_smoothing, reduction="sum")
        count = torch.full_like(total, flat.shape[0])
    else:
        target = labels.long().repeat_interleave(views) if views > 1 else labels.long()
        if target.is_cpu and not torch.compiler.is_compiling():  # elsewhere the host would have to wait
            _refuse_out_of_range(target, flat.shape[1], ignore_index)
        total = F.cross_entropy(
            flat,
            target,
            class_weights,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="sum",
        )
        counted = target != ignore_index
        if class_weights is None:
            count = counted.sum()
        else:
            count = torch.where(counted, class_weights[target.masked_fill(~counted, 0)], 0).sum()
    return total, count


def _refuse_out_of_range(labels: Tensor, classes: int, ignore_index: int) -> None:
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)]
    if len(wrong):
        raise ValueError(
            f"labels must be class indices from 0 to {classes - 1}, for logits of {classes} classes, or "
            f"ignore_index {ignore_index}, got {int(wrong[0])}"
        )


def clce_loss(
    logits: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    targets: Tensor | None = None,
    weight: float = CLCE_DEFAULTS.weight,
    temperature: float | Tensor = CLCE_DEFAULTS.temperature,
    beta: float = CLCE_DEFAULTS.beta,
    summation: str = CLCE_DEFAULTS.summation,
    label_smoothing: float = CLCE_DEFAULTS.label_smoothing,
    class_weights: Tensor | None = None,
    ignore_index: int = DEFAULTS.ignore_index,
    distributed: str | None = None,
    process_group=None,
    **options,
) -> Tensor:
    r"""CLCE (arXiv 2402.14551): ``(1 - weight) * cross_entropy + weight * contrastive loss``.

    Args:
        logits: [B, C] class logits, or [B, V, C] for V views.
        embeddings: [B, D] or [B, V, D].
        labels: [B] integer class indices.
        targets: [B, C] (or [B, V, C]) class probabilities for the cross-entropy half (mixup, cutmix); the
            contrastive half stays on ``labels``.
        weight: the mixing weight lambda, in [0, 1].
        temperature, beta, summation: of the contrastive half. ``"in"`` and tau = 0.5 follow an independent
            implementation of the paper; lambda = 0.9 is the paper's.
        label_smoothing: of the cross-entropy half, in [0, 1].
        class_weights: [C], of the cross-entropy half.
        ignore_index: images with this label count in neither half (with soft ``targets`` only the
            contrastive half looks at labels).
        distributed, process_group: as :func:`hard_negative_contrastive_loss`. Both halves are then the
            whole batch's, and so is the factor W in the gradients.
        options: further options of :func:`hard_negative_contrastive_loss`, such as ``keys``.

    Returns:
        [] loss, float32 (float64 for float64 embeddings).

    Raises:
        ValueError, TypeError: as :func:`hard_negative_contrastive_loss`; weight outside [0, 1].
    """
    try:
        check_mixing_weight(weight)
        label_smoothing = _label_smoothing(label_smoothing)
        total, count = _cross_entropy(logits, labels, targets, label_smoothing, class_weights, ignore_index)
    except (TypeError, ValueError, IndexError, RuntimeError) as problem:
        _refuse(problem, distributed, process_group)
    contrastive = hard_negative_contrastive_loss(
        embeddings,
        labels,
        temperature=temperature,
        beta=beta,
        summation=summation,
        ignore_index=ignore_index,
        distributed=distributed,
        process_group=process_group,
        **options,
    )
    if distributed is not None:
        sums = torch.stack([total, count.to(total.dtype)])
        total, count = sum_over_ranks(sums, f"clce_loss(distributed={distributed!r})", process_group).unbind()
    cross_entropy = total / torch.where(count > 0, count, torch.ones_like(count))
    return (1.0 - weight) * cross_entropy + weight * contrastive
