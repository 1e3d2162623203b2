"""Compiles the CUDA kernels and reads their machine code (SASS) back; needs nvcc and nvdisasm, but no GPU.

What is compiled stays in build/sass, by the content of csrc and the compiler's version: tools that look at
the same kernels compile them once.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build/sass"
FLAGS = ("-std=c++17", "--expt-relaxed-constexpr", "-cubin", "-lineinfo", "-Xptxas", "-v")

_LABEL = re.compile(r"(\.L_\w+):")
_SOURCE = re.compile(r'\s*//## File "([^"]+)", line (\d+)( inlined at)?')
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@P0", "@!UP1" or nothing
    name: str  # with its suffixes: "HMMA.16816.F32.BF16"
    operands: str
    source: tuple[tuple[str, int], ...] = ()  # file and line, then where that was inlined, outwards

    @property
    def op(self) -> str:
        return self.name.split(".")[0]

    @property
    def target(self) -> str:
        """The label that a branch goes to."""
        match = _TARGET.search(self.operands)
        return match[1] if match else ""


@dataclass
class Code:
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # index of the instruction that follows


@dataclass(eq=False)
class Kernel:
    name: str  # demangled, without what all names have
    arch: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    threads: int = 0
    blocks: int = 1  # that shall fit on a multiprocessor together
    code: Code = field(default_factory=Code)


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home, "bin/nvcc")] if home else []
    found = shutil.which("nvcc")
    candidates += [Path(found)] if found else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for candidate in candidates:
        if candidate.exists():
            return str(candidate)
    sys.exit("no nvcc: set CUDA_HOME or put nvcc on PATH")


def find_nvdisasm(nvcc: str) -> str:
    candidates = [Path(nvcc).with_name("nvdisasm")]
    found = shutil.which("nvdisasm")
    candidates += [Path(found)] if found else []
    for folder in map(Path, sys.path):
        candidates += sorted(folder.glob("nvidia/*/bin/nvdisasm"))
        candidates += sorted(folder.glob("triton/backends/nvidia/bin/nvdisasm"))
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    sys.exit("no nvdisasm: pip install nvidia-cuda-nvdisasm")


def parse(listing: str) -> dict[str, Code]:
    """Per function, what `nvdisasm -c -gi` prints."""
    functions: dict[str, Code] = {}
    code = None
    source: tuple[tuple[str, int], ...] = ()
    outward = False  # the next source line continues the chain
    for line in listing.splitlines():
        if match := _INSTRUCTION.match(line):
            if code is not None:
                code.instructions.append(
                    Instruction(int(match[1], 16), match[2] or "", match[3], match[4].strip(), source)
                )
            outward = False
        elif match := _SOURCE.match(line):
            here = (match[1], int(match[2]))
            source = (*source, here) if outward else (here,)
            outward = bool(match[3])
        elif match := re.match(r"\s*\.text\.(\S+):", line):
            code, source = functions.setdefault(match[1], Code()), ()
        elif code is not None and (match := _LABEL.match(line)):
            code.labels[match[1]] = len(code.instructions)
        elif line.lstrip().startswith(".section"):
            code = None
    return functions


def readable(names: list[str]) -> dict[str, str]:
    """Demangled, without what all names have."""
    filt = shutil.which("c++filt")
    plain = names
    if filt and names:
        done = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True, check=True)
        plain = done.stdout.rstrip("\n").split("\n")
    out = {}
    for mangled, name in zip(names, plain, strict=True):
        name = re.sub(r"^void |clce::(cuda::)?|ptx::|sm\d+::", "", name)
        out[mangled] = re.sub(r">\(.*\)$", ">", name)
    return out


def sources_for(arch: str) -> list[tuple[str, str]]:
    """Sources and what each is compiled for: with 90 those for all, and those for 90a alone as 90a."""
    sources = []
    for line in (ROOT / "csrc/cuda/sources.txt").read_text().splitlines():
        source, _, only = line.partition(" ")
        only = only.strip().replace(".", "")
        if source.endswith(".cu") and only.rstrip("af") in ("", arch):
            sources.append((source, only or arch))
    return sources


def _content(nvcc: str) -> str:
    """Names what the kernels are made of; the rest of csrc is not theirs to include."""
    digest = hashlib.sha256(subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout)
    digest.update(" ".join(FLAGS).encode())
    csrc = ROOT / "csrc"
    for path in sorted([*csrc.glob("*.h"), *(csrc / "cuda").rglob("*"), *(csrc / "family").rglob("*")]):
        if path.suffix in (".h", ".cuh", ".cu"):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(nvcc: str, nvdisasm: str, source: str, arch: str, content: str) -> Path:
    """The folder with log.txt, code.sass and the PTX."""
    folder = CACHE / content / f"{Path(source).stem}_{arch}"
    if (folder / "code.sass").exists():
        return folder
    work = folder.with_name(f"{folder.name}.{os.getpid()}")
    work.mkdir(parents=True)
    cubin = work / "out.cubin"
    command = [nvcc, *FLAGS, f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}"]
    command += ["--keep", "--keep-dir", str(work), "-o", str(cubin), str(ROOT / source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(work)
        sys.exit(f"{source} does not compile for sm_{arch}:\n{done.stderr}")
    disassemble = [nvdisasm, "-c", "-gi", str(cubin)]
    listing = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    (work / "log.txt").write_text(done.stderr)
    (work / "code.sass").write_text(listing.replace(f'"{ROOT}/', '"'))
    for path in work.iterdir():
        if path.suffix != ".ptx" and path.name not in ("log.txt", "code.sass"):
            path.unlink()
    try:
        work.rename(folder)
    except OSError:  # another process was quicker
        shutil.rmtree(work)
    return folder


def _read(folder: Path, arch: str) -> list[Kernel]:
    kernels: dict[str, Kernel] = {}
    entry = None
    for line in (folder / "log.txt").read_text().splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            entry = kernels.setdefault(match[1], Kernel(match[1], arch))
        if entry is None:
            continue
        if match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            entry.stack, entry.spills = int(match[1]), int(match[2]) + int(match[3])
        if match := re.search(r"Used (\d+) registers", line):
            entry.registers = int(match[1])
    for ptx in folder.glob("*.ptx"):
        for match in re.finditer(r"\.entry (\w+)\((.*?)\{", ptx.read_text(), re.S):
            if match[1] not in kernels:
                continue
            if bound := re.search(r"\.maxntid (\d+)", match[2]):
                kernels[match[1]].threads = int(bound[1])
            if bound := re.search(r"\.minnctapersm (\d+)", match[2]):
                kernels[match[1]].blocks = int(bound[1])
    for name, code in parse((folder / "code.sass").read_text()).items():
        if name in kernels:
            kernels[name].code = code
    for mangled, name in readable(list(kernels)).items():
        kernels[mangled].name = name
    return list(kernels.values())


def kernels(arches: list[str], only: str = "", jobs: int | None = None) -> list[Kernel]:
    """Of all sources whose path contains `only`, in their order."""
    nvcc = find_nvcc()
    nvdisasm = find_nvdisasm(nvcc)
    content = _content(nvcc)
    if CACHE.exists():  # what other contents left
        for old in CACHE.iterdir():
            if old.name != content:
                shutil.rmtree(old, ignore_errors=True)
    with concurrent.futures.ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        work = [
            (pool.submit(_compile, nvcc, nvdisasm, source, arch, content), arch)
            for asked in arches
            for source, arch in sources_for(asked)
            if only in source
        ]
        return [kernel for job, arch in work for kernel in _read(job.result(), arch)]
