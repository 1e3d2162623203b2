"""Which pipe of a multiprocessor an instruction of the machine code occupies, and how much."""

from __future__ import annotations

import re
from collections.abc import Mapping

import sass
from gpu_table import Gpu

# Unit of each pipe's count, and how many of it a multiprocessor does per clock.
PIPES = {
    "issue": lambda gpu: gpu.issue,
    "tensor": lambda gpu: gpu.tensor16,
    "tf32": lambda gpu: gpu.tensor_tf32,
    "fma": lambda gpu: gpu.fma / 32,
    "imad": lambda gpu: gpu.imad / 32,
    "alu": lambda gpu: gpu.alu / 32,
    "half_alu": lambda gpu: gpu.half_alu / 32,
    "mufu": lambda gpu: gpu.mufu / 32,
    "fp64": lambda gpu: gpu.fp64 / 32,
    "shared": lambda gpu: gpu.shared_bytes / 128,
    "fill": lambda gpu: gpu.l2_bytes,
}

_FMA = {"FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "FFMA32I", "FADD32I", "FMUL32I"}
_HALF_ALU = {"F2F", "F2FP", "F2I", "I2F", "I2FP", "POPC", "FLO", "I2I", "FRND"}
_ALU = {
    "IADD3", "IABS", "IMNMX", "VIMNMX", "VIADD", "VIADDMNMX", "ISETP", "FSETP", "FSET", "FMNMX", "FSEL",
    "SEL", "LOP3", "PLOP3", "SHF", "LEA", "PRMT", "BMSK", "SGXT", "MOV", "BREV", "P2R", "R2P", "FCHK", "LOP",
    "CS2R",
}  # fmt: skip
_FP64 = {"DFMA", "DADD", "DMUL", "DSETP", "DMNMX"}
_NO_PIPE = {
    "BRA", "BSSY", "BSYNC", "BAR", "EXIT", "NOP", "WARPSYNC", "LDGDEPBAR", "DEPBAR", "S2R", "S2UR", "R2UR",
    "VOTE", "VOTEU", "ULDC", "LDC", "LDG", "STG", "CALL", "RET", "BREAK", "REDUX", "MEMBAR", "ERRBAR", "CCTL",
    "ATOMG", "ATOM", "RED", "YIELD", "LD", "ST", "UMOV", "BRX", "MATCH", "ELECT", "ACQBULK", "FENCE", "LEPC",
    "WARPGROUP", "NANOSLEEP", "KILL", "BPT", "CGAERRBAR",
}  # fmt: skip


def width(name: str) -> int:
    """Bits per lane that a memory instruction moves."""
    for bits in (128, 64):
        if f".{bits}" in name:
            return bits
    return 8 if re.search(r"\.[SU]8", name) else 16 if re.search(r"\.[SU]16", name) else 32


def pipes_of(instruction: sass.Instruction) -> dict[str, float]:
    """What one warp's instruction costs, in the units of PIPES; predicated ones cost as if they ran."""
    op, name = instruction.op, instruction.name
    cost: dict[str, float] = {"issue": 1}
    if instruction.predicate == "@!PT":
        return cost  # the compiler's way to wait: it never runs
    if op == "HMMA":
        shape = re.search(r"\.(1688|16816|1684)\b", name)
        if shape is None:
            raise ValueError(f"HMMA of unknown shape: {name}")
        depth = {"1684": 4, "1688": 8, "16816": 16}[shape[1]]
        cost["tf32" if ".TF32" in name else "tensor"] = 2 * 16 * 8 * depth
    elif op in _FMA:
        cost["fma"] = 1
    elif op in ("IMAD", "IMUL", "XMAD", "IDP"):
        # The same pipe does both; integers at half of Hopper's rate.
        cost["imad"] = 1
    elif op in _HALF_ALU:
        cost["half_alu"] = 1
    elif op in _FP64:
        cost["fp64"] = 1
    elif op == "MUFU":
        cost["mufu"] = 1
    elif op in ("LDS", "STS"):
        # Wavefronts of 128 bytes: no bank conflicts, and no lanes that read the same.
        cost["shared"] = max(1, width(name) // 32)
    elif op == "LDSM":
        cost["shared"] = int(name.rsplit(".", 1)[1]) if name[-1].isdigit() else 1
    elif op == "SHFL":
        cost["shared"] = 1
    elif op == "LDGSTS":
        cost["shared"] = max(1, width(name) // 32)
        cost["fill"] = 4 * width(name)
    elif op.startswith("U") and op not in ("ULDC", "UMOV"):
        pass  # the uniform datapath: an issue slot
    elif op in _ALU:
        cost["alu"] = 1
    elif op not in _NO_PIPE:
        raise ValueError(f"instruction of unknown pipe: {name}")
    return cost


def cycles_of(total: Mapping[str, float], gpu: Gpu) -> dict[str, float]:
    """Of a multiprocessor, per pipe."""
    cycles = {pipe: total.get(pipe, 0) / rate(gpu) for pipe, rate in PIPES.items()}
    # Integer products and float32 share a pipe; conversions go the exponential's way.
    cycles["mufu"] += cycles["half_alu"]
    cycles["fma"] += cycles.pop("imad")
    cycles["tensor"] += cycles.pop("tf32")
    cycles.pop("half_alu")
    return cycles
