"""Times, taken round-robin: in every round each competitor runs once, so that what the machine does
meanwhile hits all alike, and ratios are taken inside a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.cases import Case, Inputs
from bench.competitors import Loss, Yardstick

Mark = Callable[[], None]
Run = Callable[[Inputs, Mark], None]


class CpuMarks:
    """Points in time, and the seconds between them."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def __call__(self) -> None:
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [end - begin for begin, end in zip(self._marks, self._marks[1:], strict=False)]


class CudaMarks:
    """The same on the current stream."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def __call__(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        self._marks[-1].synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [begin.elapsed_time(end) * 1e-3 for begin, end in pairs]


@dataclass
class Job:
    """Something to time: its phases lie between the marks that ``run`` makes."""

    competitor: str
    phases: tuple[str, ...]
    run: Run
    launch: str = "stream"
    factor: float = 1.0  # a measured part of the whole, times this
    inner: int = 1  # runs of one sample
    samples: list[list[float]] = field(default_factory=list)  # a sample: seconds of each phase

    def sample(self, device: str, inputs: list[Inputs], turn: int) -> None:
        total = [0.0] * len(self.phases)
        all_marks = []
        for i in range(self.inner):
            marks = CudaMarks() if device.startswith("cuda") else CpuMarks()
            self.run(inputs[(turn + i) % len(inputs)], marks)
            all_marks.append(marks)
        for marks in all_marks:
            for phase, seconds in enumerate(marks.seconds()):
                total[phase] += seconds * self.factor / self.inner
        self.samples.append(total)

    def of(self, mode: str) -> list[float]:
        """Seconds per sample of a mode: one of the phases, or "full", their sum."""
        if mode == "full":
            return [sum(sample) for sample in self.samples]
        return [sample[self.phases.index(mode)] for sample in self.samples]


def forward_job(name: str, loss: Loss) -> Job:
    def run(inputs: Inputs, mark: Mark) -> None:
        with torch.no_grad():
            mark()
            loss(inputs)
            mark()

    return Job(name, ("forward",), run)


def step_job(name: str, loss: Loss) -> Job:
    """Forward and backward of a training step."""

    def run(inputs: Inputs, mark: Mark) -> None:
        mark()
        value = loss(inputs)
        mark()
        torch.autograd.grad(value, inputs.leaves)
        mark()

    return Job(name, ("forward of a step", "backward"), run)


def mm_job(yardstick: Yardstick) -> Job:
    def run(inputs: Inputs, mark: Mark) -> None:
        with torch.no_grad():
            mark()
            yardstick(inputs)
            mark()

    return Job("mm", ("mm",), run, factor=yardstick.factor)


def graph_job(name: str, phase: str, call: Callable[[], object]) -> Job:
    """Replays of a CUDA graph of ``call``: its kernels without Python and without launches.

    A graph holds the addresses it was captured with, so its input is always the same one (and in L2).
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()

    def run(inputs: Inputs, mark: Mark) -> None:
        mark()
        graph.replay()
        mark()

    run.held = held  # the graph's outputs live as long as the job
    return Job(name, (phase,), run, launch="graph")


class JobFailed(Exception):
    """A job raised, for instance for want of memory; the cause is its ``__cause__``."""

    def __init__(self, job: Job):
        super().__init__(job.competitor)
        self.job = job


def _sample(job: Job, device: str, inputs: list[Inputs], turn: int) -> None:
    try:
        job.sample(device, inputs, turn)
    except Exception as error:
        raise JobFailed(job) from error


def calibrate(job: Job, case: Case, inputs: list[Inputs], shortest: float) -> float:
    """Warms the job up, chooses ``inner`` so that a sample lasts ``shortest``; seconds of a sample."""
    _sample(job, case.device, inputs, 0)
    job.samples.clear()
    _sample(job, case.device, inputs, 1)
    seconds = job.of("full")[0] / job.factor
    if seconds < shortest:  # a quick job's first runs are slower than its usual ones
        job.inner = 5
        _sample(job, case.device, inputs, 2)
        seconds = max(job.of("full")[-1] / job.factor, 1e-7)
        job.inner = max(1, min(1000, round(shortest / seconds)))
    job.samples.clear()
    return seconds * job.inner


def measure(
    jobs: list[Job], case: Case, inputs: list[Inputs], rounds: int, budget: float, shortest: float
) -> int:
    """Fills the jobs' samples; stops after ``rounds`` rounds or, from the third on, ``budget`` seconds."""
    for job in jobs:
        calibrate(job, case, inputs, shortest)
    start = time.perf_counter()
    for turn in range(rounds):
        for k in range(len(jobs)):  # each round starts with another one
            job = jobs[(turn + k) % len(jobs)]
            _sample(job, case.device, inputs, turn * job.inner)
        if turn >= 2 and time.perf_counter() - start > budget:
            return turn + 1
    return rounds


def summary(seconds: list[float], yardstick: list[float]) -> dict:
    """Median and spread of times, and of their ratio to the yardstick's of the same round."""
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
    ratios = [a / b for a, b in zip(seconds, yardstick, strict=True)]
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "q25_s": low,
        "q75_s": high,
        "ratio_mm": statistics.median(ratios),
        "ratio_mm_of_min": min(seconds) / min(yardstick),
    }
