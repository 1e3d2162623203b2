"""``python -m bench``: the losses and their competitors, timed in one run."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import machine, memory, report, timing
from bench.cases import DTYPES, Case, Inputs, copies_to_leave_cache, make_inputs
from bench.check import Checker
from bench.competitors import COMPETITORS, Competitor, Loss, Yardstick

MODES = ("forward", "backward", "full", "memory")
TIMES = MODES[:3]
GRAPH_BATCH = 1024  # largest B whose CUDA graph is timed too: beyond it launches do not count


@dataclass(frozen=True)
class Block:
    """All combinations of a few choices."""

    batches: tuple[int, ...]
    dims: tuple[int, ...]
    dtypes: tuple[str, ...] = ("float32",)
    betas: tuple[float, ...] = (1.0,)
    problem: str = "self"
    modes: tuple[str, ...] = MODES
    competitors: tuple[str, ...] = ("ours", "eager", "compile", "chunked")

    def cases(self, device: str, temperature: float, seed: int) -> list[Case]:
        return [
            Case(device, self.problem, dtype, batch, dim, beta, temperature, seed=seed)
            for dtype in self.dtypes
            for beta in self.betas
            for dim in self.dims
            for batch in self.batches
        ]


CPU = ("ours", "portable", "eager", "compile", "chunked")
PEERS = ("ours", "portable", "eager", "compile", "chunked", "metric-learning")
TRITON = ("inf-cl", "memeff", "siglip-kernel")
BF16 = ("bfloat16",)
# In the order of their weight: where time runs out, the last ones are missing.
PRESETS = {
    "quick": (
        Block((64, 200), (32,), modes=TIMES, competitors=("ours", "eager", "chunked")),
        Block((64,), (32,), betas=(0.0,), modes=TIMES, competitors=("ours", "eager", "metric-learning")),
        Block((256,), (32,), modes=("memory",), competitors=("ours",)),
    ),
    "cpu": (
        Block((256, 1024, 4096), (128, 768), modes=TIMES, competitors=CPU),
        Block((32768,), (128,), modes=("memory",), competitors=("ours", "portable", "chunked")),
        Block((1024, 4096), (128,), modes=("memory",), competitors=CPU),
        Block((1024,), (128,), betas=(0.0,), modes=TIMES, competitors=PEERS),
        Block((1024,), (128,), betas=(0.0,), problem="clip", modes=TIMES, competitors=CPU),
    ),
    "goals": (
        Block((32768,), (768, 128, 256), BF16, competitors=("ours",)),
        Block((2**20,), (256,), BF16, competitors=("ours",)),
        Block((16384,), (128,), BF16, modes=TIMES, competitors=("ours", "eager", "compile")),
        Block((64, 256, 1024), (128,), BF16, modes=TIMES, competitors=("ours", "eager", "compile")),
        Block((16384,), (768,), BF16, modes=TIMES, competitors=("ours", "eager", "compile")),
        Block((64, 256, 1024), (768,), BF16, modes=TIMES, competitors=("ours", "eager", "compile")),
    ),
    "h100": (
        Block((64, 256, 1024, 16384), (128,), BF16),
        Block((16384,), (768,), BF16),
        Block((32768,), (128, 768), BF16, competitors=("ours", "eager", "chunked")),
        Block((262144,), (128, 768), BF16, competitors=("ours",)),
        Block((64, 1024, 4096), (768,), BF16, competitors=("ours", "eager", "chunked")),
        Block(
            (1024, 16384),
            (256, 768),
            BF16,
            betas=(0.0,),
            problem="clip",
            competitors=("ours", "eager", *TRITON),
        ),
        Block((65536,), (768,), BF16, betas=(0.0,), problem="clip", competitors=("ours", *TRITON)),
        Block((1024, 16384), (128,), BF16, betas=(0.0,), competitors=("ours", "eager", "metric-learning")),
        Block((4096,), (128,), BF16, competitors=("ours", "eager", "chunked")),
        Block((1024, 16384), (64, 256, 512, 1024), BF16, competitors=("ours", "eager")),
        Block((1024, 16384), (128, 768), ("float16", "float32"), competitors=("ours", "eager")),
        Block((262144,), (64, 256, 1024), BF16, competitors=("ours",)),
        Block((65536, 131072), (128, 768), BF16, competitors=("ours",)),
    ),
}
ON_CUDA = ("goals", "h100")
MILLION = (Block((2**20,), (256,), BF16, competitors=("ours",)),)


@dataclass
class Settings:
    device: str
    rounds: int
    budget: float  # seconds of a case's rounds
    shortest: float  # seconds of a sample
    check_rows: int
    memory_limit: int | None
    deadline: float | None
    checker: Checker = field(init=False)

    def __post_init__(self) -> None:
        self.checker = Checker(self.check_rows)

    def available(self) -> int:
        free = machine.available_bytes(self.device)
        return free if self.memory_limit is None else min(free, self.memory_limit)


def _row(
    case: Case, competitor: str, mode: str, status: str = "ok", launch: str = "stream", **values
) -> dict:
    fields = {name: getattr(case, name) for name in report.CASE}
    return fields | {"competitor": competitor, "mode": mode, "launch": launch, "status": status} | values


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _free_cache(case: Case) -> None:
    if case.device.startswith("cuda"):
        torch.cuda.empty_cache()


def _run_jobs(case: Case, jobs: list[timing.Job], inputs: list[Inputs], settings: Settings) -> list[dict]:
    """Times all jobs together; one that fails is left out and told."""
    rows = []
    while jobs:
        try:
            rounds = timing.measure(jobs, case, inputs, settings.rounds, settings.budget, settings.shortest)
            break
        except timing.JobFailed as failure:
            name = failure.job.competitor
            if name == "mm":
                raise
            rows.append(
                _row(case, name, "full", "failed", failure.job.launch, note=_reason(failure.__cause__))
            )
            jobs = [job for job in jobs if job.competitor != name or job.launch != failure.job.launch]
            for job in jobs:
                job.samples.clear()
            _free_cache(case)
    yardstick = next(job for job in jobs if job.competitor == "mm").of("mm")
    for job in jobs:
        modes = ("backward", "full") if "backward" in job.phases else job.phases
        for mode in modes:
            figures = timing.summary(job.of(mode), yardstick)
            figures["gflops"] = case.flop(mode) / figures["median_s"] * 1e-9
            rows.append(
                _row(case, job.competitor, mode, "ok", job.launch, rounds=rounds, inner=job.inner, **figures)
            )
    return rows


def _graph_jobs(
    case: Case, losses: dict[str, Loss], inputs: Inputs, yardstick: Yardstick
) -> tuple[list, list]:
    """CUDA graphs of the step, and the rows of those that could not be captured."""
    jobs, rows = [], []
    for name, loss in losses.items():
        if not COMPETITORS[name].capturable:
            continue

        def step(loss: Loss = loss) -> object:
            return torch.autograd.grad(loss(inputs), inputs.leaves)

        try:
            jobs.append(timing.graph_job(name, "full", step))
        except Exception as error:
            rows.append(_row(case, name, "full", "failed", "graph", note=_reason(error)))
    return jobs, rows


def _memory_row(case: Case, competitor: Competitor, loss: Loss | None) -> dict:
    try:
        if case.device == "cpu":
            figures = memory.cpu_memory(case, competitor.name, torch.get_num_threads())
        else:
            (inputs,), loss = make_inputs(case), loss or competitor.build(case)
            memory.cuda_peak_bytes(loss, inputs)  # compilers, workspaces of libraries
            figures = {
                "peak_extra_bytes": memory.cuda_peak_bytes(loss, inputs),
                "saved_bytes": memory.saved_bytes(loss, inputs),
            }
    except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
        return _row(case, competitor.name, "memory", "failed", note=_reason(error))
    finally:
        _free_cache(case)
    return _row(case, competitor.name, "memory", **figures)


def run_case(case: Case, names: tuple[str, ...], modes: tuple[str, ...], settings: Settings) -> list[dict]:
    """All rows of one case."""
    rows: list[dict] = []
    running: list[Competitor] = []
    losses: dict[str, Loss] = {}
    for name in names:
        reason = COMPETITORS[name].reason_to_skip(case, settings.available())
        if reason is None:
            running.append(COMPETITORS[name])
        else:
            rows.append(
                _row(case, name, "full" if set(modes) & set(TIMES) else "memory", "skipped", note=reason)
            )

    if set(modes) & set(TIMES):
        inputs = make_inputs(case, copies_to_leave_cache(case, machine.cache_bytes(case.device)))
        errors: dict[str, dict] = {}
        for competitor in running:
            try:
                loss = competitor.build(case)
                errors[competitor.name] = settings.checker(competitor, case, loss, inputs[0])
                losses[competitor.name] = loss
            except Exception as error:  # a competitor's own failure is a result, not the end of the run
                rows.append(_row(case, competitor.name, "full", "failed", note=_reason(error)))
                _free_cache(case)
        yardstick = Yardstick.of(case, settings.available())
        jobs = [timing.mm_job(yardstick)]
        if "forward" in modes:
            jobs += [timing.forward_job(name, loss) for name, loss in losses.items()]
        if "backward" in modes or "full" in modes:
            jobs += [timing.step_job(name, loss) for name, loss in losses.items()]
        if case.device.startswith("cuda") and case.batch <= GRAPH_BATCH and "full" in modes:
            graphs, failed = _graph_jobs(case, losses, inputs[0])
            jobs += graphs
            rows += failed
        timed = _run_jobs(case, jobs, inputs, settings)
        for row in timed:
            if row["competitor"] == "mm":
                row["note"] = yardstick.note
            elif row["mode"] == "full":
                row.update(errors.get(row["competitor"], {}))
        rows += [row for row in timed if row["mode"] == "mm" or row["mode"] in modes]
        running = [competitor for competitor in running if competitor.name in losses]
        del inputs, jobs
        _free_cache(case)

    if "memory" in modes:
        rows += [_memory_row(case, competitor, losses.get(competitor.name)) for competitor in running]
    order = ["mm", *names]
    return sorted(rows, key=lambda row: (order.index(row["competitor"]), row["launch"] == "graph"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", default=None, help="cpu (default) or cuda")
    parser.add_argument(
        "--preset", choices=PRESETS, help="a set of cases; the options below then do not apply"
    )
    parser.add_argument(
        "--million", action="store_true", help="the case B 1048576, D 256, bfloat16 (added to a preset)"
    )
    parser.add_argument("--problem", choices=("self", "clip"), default="self")
    parser.add_argument("--batches", "-B", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--dims", "-D", type=int, nargs="+", default=[128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--betas", type=float, nargs="+", default=[1.0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--competitors", nargs="+", choices=COMPETITORS, default=None, help="default: all that apply"
    )
    every = parser.add_argument_group("with or without a preset")
    every.add_argument(
        "--without", nargs="+", choices=COMPETITORS, default=[], help="competitors to leave out"
    )
    every.add_argument("--temperature", type=float, default=0.5)
    every.add_argument("--threads", type=int, default=None, help="CPU threads (preset cpu: 2)")
    every.add_argument("--tf32", action="store_true", help="let CUDA multiply float32 as TF32")
    every.add_argument(
        "--rounds", type=int, default=None, help="samples of each competitor (default 15; cuda 30)"
    )
    every.add_argument(
        "--budget", type=float, default=None, help="seconds of a case's rounds (default 60; cuda 1)"
    )
    every.add_argument(
        "--shortest", type=float, default=None, help="seconds of a sample (default 0.02; cuda 0.002)"
    )
    every.add_argument("--time-limit", type=float, default=None, help="seconds after which no case is begun")
    every.add_argument("--memory-limit", type=float, default=None, help="GiB that a competitor may take")
    every.add_argument("--check-rows", type=int, default=4096, help="largest B compared with float64")
    every.add_argument("--seed", type=int, default=0)
    every.add_argument(
        "--out", type=Path, default=Path("bench/out/latest"), help="path without ending: .csv .json .png .svg"
    )
    every.add_argument("--no-plot", action="store_true")
    return parser


def _blocks(args: argparse.Namespace) -> tuple[Block, ...]:
    blocks = PRESETS[args.preset] if args.preset else ()
    if args.million:
        blocks += MILLION
    if not blocks:
        blocks = (
            Block(
                tuple(args.batches), tuple(args.dims), tuple(args.dtypes), tuple(args.betas), args.problem,
                tuple(args.modes), tuple(args.competitors or COMPETITORS),
            ),
        )  # fmt: skip
    return blocks


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    device = args.device or ("cuda" if args.preset in ON_CUDA or args.million else "cpu")
    cuda = device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        print(f"--device {device}: this machine has no CUDA device that torch can use")
        return 2
    threads = args.threads or (2 if args.preset == "cpu" else None)
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = args.tf32

    started = time.perf_counter()
    limit = args.time_limit or (240.0 if args.preset in ON_CUDA else None)
    settings = Settings(
        device=device,
        rounds=args.rounds or (3 if args.preset == "quick" else 30 if cuda else 15),
        budget=args.budget or (1.0 if args.preset == "quick" or cuda else 60.0),
        shortest=args.shortest or (0.002 if cuda or args.preset == "quick" else 0.02),
        check_rows=args.check_rows,
        memory_limit=None if args.memory_limit is None else int(args.memory_limit * 2**30),
        deadline=None if limit is None else started + limit,
    )
    meta = machine.metadata(device)
    print(
        f"{meta['device_name']}, {meta['threads']} threads, torch {meta['torch']}; "
        f"clce_ext {meta['clce_ext']} "
        f"({meta['cpu_capability']}, cuda {meta['cuda'] or 'none'}), commit {meta['commit']}; "
        f"load {meta['load']}"
    )

    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for block in _blocks(args):
        names = tuple(name for name in block.competitors if name not in args.without)
        for case in block.cases(device, args.temperature, args.seed):
            if settings.deadline is not None and time.perf_counter() > settings.deadline:
                print(f"not begun, the time limit is over: {case}")
                continue
            found = [meta | row for row in run_case(case, names, block.modes, settings)]
            report.print_case(str(case), found)
            rows += found
            # After every case: what was measured survives an interruption.
            report.write_csv(args.out.with_suffix(".csv"), rows)
            report.write_json(args.out.with_suffix(".json"), rows)
    written = [args.out.with_suffix(".csv"), args.out.with_suffix(".json")]
    if not args.no_plot:
        written += report.plot(rows, args.out)
    print(f"{time.perf_counter() - started:.0f} s; wrote " + ", ".join(map(str, written)))
    return 1 if any(row["status"] == "failed" for row in rows) else 0
