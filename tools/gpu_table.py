"""What the model of tools/pipe_model.py assumes about a device. None of it is measured here.

Every figure has its source; those marked "to be measured" are what tools/gpu_probe measures, and are to be
replaced by what it finds. Rates are per multiprocessor and clock.

Sources: [guide] CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions" and "Technical
Specifications per Compute Capability"; [h100], [a100] NVIDIA's white papers of the two architectures;
[hopper] Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking and Multiple Level
Analysis", arXiv 2501.12084; [sync] Zhang et al., "A Study of Single and Multi-device Synchronization Methods
in Nvidia GPUs", arXiv 2004.05371, on a V100; [forum] NVIDIA's developer forum, "Too much time for kernel
launch latency": about 3 us for an empty kernel.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    multiprocessors: int
    clock: float  # Hz, under load
    issue: float  # warp instructions: one per scheduler, four schedulers [guide]
    tensor16: float  # FLOP of mma.sync with 16-bit operands and float32 sums
    tensor_tf32: float
    fma: float  # lanes of float32 additions, products, fused ones [guide]
    imad: float  # lanes of 32-bit integer multiply-add [guide]
    alu: float  # lanes of integer, logic, compare, select, shift [guide]
    half_alu: float  # lanes of conversions and population counts [guide]
    mufu: float  # lanes of reciprocal, exponential, logarithm [guide]
    fp64: float  # lanes [guide]
    shared_bytes: float  # 32 banks of 4 bytes [guide]
    shared_per_multiprocessor: int  # bytes [guide]
    l2_bytes: float
    memory: float  # bytes per second
    launch: float  # seconds per kernel, with its dependence on the one before
    meet: float  # seconds for all blocks of a cooperative launch to meet


H100 = Gpu(
    name="H100",
    arch="90",
    multiprocessors=132,  # the SXM part [h100]
    clock=1.755e9,  # its boost under sustained tensor load; to be measured
    issue=4,
    # wgmma does 4096 FLOP (989 TFLOP/s at 132 multiprocessors and 1.83 GHz [h100]); mma.sync about 62 % of
    # that [hopper]; to be measured.
    tensor16=0.62 * 4096,
    tensor_tf32=0.62 * 2048,
    fma=128,
    imad=64,
    alu=64,
    half_alu=16,
    mufu=16,
    fp64=64,
    shared_bytes=128,
    shared_per_multiprocessor=228 * 1024,
    l2_bytes=24,  # 5.5 TB/s over all multiprocessors; to be measured
    memory=0.9 * 3.35e12,  # 90 % of the data sheet's [h100]; to be measured
    launch=3e-6,  # [forum]; to be measured
    meet=1.5e-6,  # [sync]; to be measured
)

A100 = Gpu(
    name="A100",
    arch="80",
    multiprocessors=108,  # [a100]
    clock=1.41e9,  # [a100]
    issue=4,
    tensor16=2048,  # 312 TFLOP/s [a100]; mma.sync is all there is
    tensor_tf32=1024,
    fma=64,
    imad=64,
    alu=64,
    half_alu=16,
    mufu=16,
    fp64=32,
    shared_bytes=128,
    shared_per_multiprocessor=164 * 1024,
    l2_bytes=5120 / 108,  # 5120 bytes per clock for the whole device [a100]
    memory=0.9 * 1.555e12,  # 40 GB part [a100]; to be measured
    launch=3e-6,  # [forum]; to be measured
    meet=1.5e-6,  # [sync]; to be measured
)

GPUS = {gpu.name.lower(): gpu for gpu in (H100, A100)}
