"""A model of one training step's loss across W ranks: bytes, compute, overlap, memory, for gather and ring.

    python -m bench.scaling_model                     tables for docs/scaling.md
    python -m bench.scaling_model --measure 3         the same formulas against gloo processes on this machine

The byte counts are exact and are checked against real runs. Times are *predictions* for hardware with
the figures of ``Hardware``, by a simulation of the two schedules of clce_ext/distributed; nothing here has
been timed on a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass

ACC_BYTES = 4  # gradients and statistics of float32, bfloat16 and float16 embeddings
LABEL_BYTES = 8
TERMS_BYTES = 2 * 8  # loss and number of terms, float64
GRAD_LOSS_BYTES = 8
AGREEMENT_BYTES = 4 * 8  # what ranks tell each other first


@dataclass(frozen=True)
class Hardware:
    """Assumed, not measured."""

    name: str
    bytes_per_s: float  # one direction, per GPU
    latency_s: float  # of one message
    flops: float = 400e12  # what the kernels reach: 40 % of an H100's 989 bfloat16 TFLOPS
    launch_s: float = 30e-6  # of one shard's statistics or backward


NVLINK = Hardware("NVLink", 0.8 * 450e9, 3e-6)  # fourth generation: 450 GB/s each way, 80 % of it
NETWORK = Hardware("400 Gb/s", 0.9 * 50e9, 10e-6)  # one such card per GPU, 90 % of it


@dataclass(frozen=True)
class Step:
    """Forward and backward of self-contrast; ``rows`` anchors on each of ``ranks``."""

    ranks: int
    rows: int
    dim: int
    element_bytes: int = 2

    @property
    def columns(self) -> int:
        return -(-self.dim // 8) * 8

    @property
    def key_bytes(self) -> int:
        """One rank's keys and labels."""
        return self.rows * (self.columns * self.element_bytes + LABEL_BYTES)

    @property
    def gradient_bytes(self) -> int:
        return self.rows * self.columns * ACC_BYTES

    def bytes_sent(self, transport: str) -> dict[str, float]:
        """By one rank, where collectives send what a ring algorithm does."""
        others = self.ranks - 1
        around = {"gather": 1, "ring": 2}[transport]  # the ring's keys go round again in the backward
        return {
            "keys": around * others * self.key_bytes,
            "gradients": others * self.gradient_bytes,
            "sums": 2 * others / self.ranks * (TERMS_BYTES + GRAD_LOSS_BYTES),
            "agreement": others * AGREEMENT_BYTES,
        }

    def flops(self) -> dict[str, float]:
        """Of one rank; the own shard is symmetric: half the logits, both sides in one pass."""
        square = float(self.rows) ** 2 * self.dim
        return {
            "own forward": square,
            "forward": 2 * square,
            "own backward": 4 * square,
            "backward": 6 * square,
        }

    def memory(self, transport: str) -> float:
        """Bytes of O(B D) tensors at the backward's peak."""
        one = self.rows * self.columns
        if transport == "ring":
            # z, keys here and coming; dz, its part, the keys' gradient here, coming, leaving
            return one * (3 * self.element_bytes + 5 * ACC_BYTES)
        # z and all keys; dz, its part; all keys' gradient, and the part of it that is being made
        return one * ((1 + self.ranks) * self.element_bytes + (2 + 2 * self.ranks) * ACC_BYTES)


class _Link:
    """Sends one message after the other."""

    def __init__(self, hardware: Hardware):
        self.hardware, self.free, self.busy = hardware, 0.0, 0.0

    def send(self, now: float, size: float, hops: int = 1) -> float:
        """When the last of ``hops`` messages of ``size`` has arrived."""
        seconds = hops * (size / self.hardware.bytes_per_s + self.hardware.latency_s)
        self.free = max(now, self.free) + seconds
        self.busy += seconds
        return self.free


@dataclass(frozen=True)
class Times:
    """Seconds of forward and backward; of them those of the kernels, and those the link is busy."""

    total: float
    compute: float
    link: float

    @property
    def hidden(self) -> float:
        """Share of the link's time that passes while kernels run."""
        return max(0.0, self.compute + self.link - self.total) / self.link


def simulate(step: Step, transport: str, hardware: Hardware) -> Times:
    """The schedules of clce_ext/distributed on one rank, all ranks being alike."""
    seconds = {name: count / hardware.flops for name, count in step.flops().items()}
    launch, others, link = hardware.launch_s, step.ranks - 1, _Link(hardware)

    def sums(now: float) -> float:
        return link.send(now, 0, 2 * step.ranks.bit_length())

    now = compute = 0.0

    def run(kernel: str, shards: int = 1, launches: int = 1):
        nonlocal now, compute
        duration = shards * seconds[kernel] + launches * launch
        now, compute = now + duration, compute + duration

    if transport == "gather":
        blocks = min(2, others)  # the keys before this rank's, and those after
        arrival = link.send(now, step.key_bytes, others)
        run("own forward")
        now = max(now, arrival)
        run("forward", others, blocks)
        now = sums(sums(now))
        run("own backward")
        run("backward", others, blocks)
        return Times(link.send(now, step.gradient_bytes, others), compute, link.busy)
    for phase in ("forward", "backward"):
        if phase == "backward":
            now = sums(now)
        arrival = link.send(now, step.key_bytes)
        run(f"own {phase}")
        gradient = now
        for shard in range(1, step.ranks):
            now = max(now, arrival)
            if shard < others:
                arrival = link.send(now, step.key_bytes)
            run(phase)
            if phase == "backward":
                now = max(now, gradient)
                gradient = link.send(now, step.gradient_bytes)
        now = max(now, gradient) if phase == "backward" else sums(now)
    return Times(now, compute, link.busy)


def table(dim: int, ranks: list[int], rows: list[int]) -> str:
    """Markdown: seconds, in brackets the share of communication hidden; the faster one is bold."""
    lines = [
        "| W | B_local | sent: gather | ring | memory: gather | ring | compute "
        f"| {NVLINK.name}: gather | ring | {NETWORK.name}: gather | ring |",
        "|---" * 11 + "|",
    ]
    for size in ranks:
        for count in rows:
            step = Step(size, count, dim)
            cells = [str(size), str(count)]
            cells += [_bytes(sum(step.bytes_sent(transport).values())) for transport in ("gather", "ring")]
            cells += [_bytes(step.memory(transport)) for transport in ("gather", "ring")]
            flops, others = step.flops(), size - 1
            total = (
                flops["own forward"] + flops["own backward"] + others * (flops["forward"] + flops["backward"])
            )
            cells.append(_seconds(total / NVLINK.flops))
            for hardware in (NVLINK, NETWORK):
                times = {transport: simulate(step, transport, hardware) for transport in ("gather", "ring")}
                best = min(t.total for t in times.values())
                for t in times.values():
                    text = _seconds(t.total)
                    text = f"**{text}**" if t.total == best else text
                    cells.append(f"{text} ({t.hidden:.0%})")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


# ---- against real processes ----


def count_bytes(function) -> dict[str, float]:
    """Bytes that ``function`` makes this rank send, by collective, from the tensors handed to c10d."""
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sent: dict[str, float] = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "c10d":
                ranks = dist.get_world_size()
                name = op._opname
                size = {
                    "send": lambda: _size(args[0]),
                    "recv_": lambda: 0,
                    "_allgather_base_": lambda: (ranks - 1) * _size(args[1]),
                    "_reduce_scatter_base_": lambda: (ranks - 1) / ranks * _size(args[1]),
                    "allreduce_": lambda: 2 * (ranks - 1) / ranks * _size(args[0]),
                }[name]()
                sent[name] = sent.get(name, 0) + size
            return op(*args, **(kwargs or {}))

    def _size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tree_leaves(tensors))

    with Count():
        function()
    return sent


def count_on_rank(transport: str, rows: int, dim: int) -> dict[str, float]:
    import torch

    from clce_ext import hard_negative_contrastive_loss

    z, y = torch.randn(rows, dim, requires_grad=True), torch.randint(7, (rows,))
    return count_bytes(lambda: hard_negative_contrastive_loss(z, y, distributed=transport).backward())


def _measure(rank: int, ranks: int, store: str, rows: int, dim: int):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for transport in ("gather", "ring"):
        counted = count_on_rank(transport, rows, dim)
        if rank == 0:
            model = Step(ranks, rows, dim, element_bytes=4).bytes_sent(transport)
            print(f"{transport}: counted {sum(counted.values()):.0f} bytes {counted}")
            print(f"{transport}: model   {sum(model.values()):.0f} bytes {model}")
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", type=int, metavar="RANKS", help="count bytes of a real gloo run instead")
    parser.add_argument("--rows", type=int, default=1024, help="anchors per rank, with --measure")
    parser.add_argument("--dim", type=int, default=256, help="with --measure")
    args = parser.parse_args()
    if args.measure:
        import torch.multiprocessing as processes

        with tempfile.TemporaryDirectory() as folder:
            shared = (args.measure, f"{folder}/store", args.rows, args.dim)
            processes.spawn(_measure, shared, args.measure)
        return
    for dim in (256, 768):
        print(f"\n### D = {dim}\n")
        print(table(dim, [2, 8, 64, 256, 1024], [1024, 4096, 32768]))


if __name__ == "__main__":
    main()
