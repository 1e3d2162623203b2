"""Builds clce_ext/libclce_ext.so: CPU kernels, and CUDA kernels where a CUDA torch and its toolkit are found.

It uses torch's stable C++ ABI alone and no Python: one file for every Python and every torch from 2.10 on.

Without a C++ compiler nothing is built, and clce_ext computes in plain torch operations.

Environment:
    CLCE_CUDA=auto|0|1        auto (default): with CUDA where possible; 1: fail where it is not
    CUDA_HOME                 the toolkit; otherwise the one that the nvcc on PATH belongs to
    TORCH_CUDA_ARCH_LIST      e.g. "8.0;9.0+PTX"; otherwise the GPUs of this machine, or the default below
    MAX_JOBS                  compilers at a time; otherwise bounded by cores and memory
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # which reads the licence as pyproject.toml has it
    raise SystemExit(
        f"clce_ext needs setuptools 77 or later to build, this is {setuptools.__version__}: "
        "pip install --upgrade 'setuptools>=77'"
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
DEFAULT_ARCHS = "8.0;9.0+PTX"  # all of compute capability 8 run 8.0's, which tools/check_sass.py looks at
OLDEST_TORCH = (2, 10)  # whose stable ABI has what is needed
OLDEST_GPU = (8, 0)  # Ampere: cp.async, bfloat16 on tensor cores
MEMORY_PER_JOB = 3 << 30  # bytes; a CUDA instance takes most


def toolkit() -> str | None:
    """The CUDA toolkit's folder: CUDA_HOME, or what the nvcc on PATH (maybe a wrapper) calls its top."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "none.cu"], capture_output=True, text=True)
        if top := re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.M):
            candidates.append(os.path.realpath(top.group(1)))
    candidates += ["/usr/local/cuda"]
    for home in candidates:
        if home and Path(home, "bin/nvcc").exists() and Path(home, "include/cuda_runtime.h").exists():
            return home
    return None


CUDA_HOME = toolkit()
if CUDA_HOME:
    os.environ["CUDA_HOME"] = CUDA_HOME  # before torch guesses

try:
    import torch
except ImportError as error:
    raise SystemExit(
        "clce_ext is built against torch: install torch first, and build with --no-build-isolation"
    ) from error
from torch.utils import cpp_extension  # noqa: E402


def decide_cuda() -> tuple[bool, str]:
    """Whether CUDA kernels are built, and why (not)."""
    wanted = os.environ.get("CLCE_CUDA", "auto").lower()
    if wanted in ("0", "off", "no"):
        return False, "CLCE_CUDA=0"
    reason = None
    if not torch.version.cuda:
        reason = f"torch {torch.__version__} is a build without CUDA"
    elif not CUDA_HOME:
        reason = "no CUDA toolkit found (set CUDA_HOME)"
    elif os.environ.get("TORCH_CUDA_ARCH_LIST") is None and torch.cuda.is_available():
        gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        if usable := sorted({OLDEST_GPU if gpu[0] == 8 else gpu for gpu in gpus if gpu >= OLDEST_GPU}):
            os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(f"{major}.{minor}" for major, minor in usable)
        else:
            newest = ".".join(map(str, max(gpus)))
            reason = f"the kernels need compute capability 8.0 or later, this machine's GPU has {newest}"
    if reason is None:
        return True, f"torch {torch.__version__} and the toolkit in {CUDA_HOME}"
    if wanted in ("1", "on", "yes"):
        raise SystemExit(f"CLCE_CUDA=1 but CUDA kernels cannot be built: {reason}")
    return False, reason


def has_compiler() -> bool:
    named = os.environ.get("CXX", "").split()[:1]
    return platform.system() == "Windows" or any(map(shutil.which, named or ("c++", "g++", "clang++")))


def max_jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, memory // MEMORY_PER_JOB))


WITH_CUDA, WHY = decide_cuda()
os.environ.setdefault("MAX_JOBS", str(max_jobs()))
if WITH_CUDA:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)  # no GPU to ask

X86_TILES = {
    "csrc/cpu/tile_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/tile_avx512.cpp": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-Wno-uninitialized",  # gcc 12 warns of its own intrinsics (gcc bug 105593)
    ],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
CXX_FLAGS = [
    "-std=c++17",  # older C++ runtimes have what it needs
    "-O3",
    "-g0",
    "-ffp-contract=off",  # forward and backward must round a logit alike; fused where fmadd is written
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fvisibility=hidden"]


def cuda_sources() -> dict[str, list[str]]:
    """The CUDA sources by the only architecture that they are for; "" for all (see sources.txt)."""
    sources: dict[str, list[str]] = {"": []}
    for line in (ROOT / "csrc/cuda/sources.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            source, *architecture = line.split()
            sources.setdefault("".join(architecture), []).append(source)
    return sources


def flags_of_their_own() -> dict[str, tuple[list[str], list[str] | dict[str, list[str]]]]:
    """Sources that are not compiled as the others are, by a name for each kind: the sources, their flags."""
    kinds = {}
    if IS_X86:
        for source, flags in X86_TILES.items():
            kinds[Path(source).stem] = ([source], [*CXX_FLAGS, *flags])
    if WITH_CUDA:
        for architecture, sources in cuda_sources().items():
            if number := architecture.replace(".", ""):
                only = f"-gencode=arch=compute_{number},code=sm_{number}"
                kinds[f"sm_{number}"] = (sources, {"cxx": list(CXX_FLAGS), "nvcc": [*NVCC_FLAGS, only]})
    return kinds


def macros() -> list[tuple[str, str | None]]:
    major, minor = OLDEST_TORCH
    defined: list[tuple[str, str | None]] = [
        ("TORCH_TARGET_VERSION", f"0x{major << 56 | minor << 48:016x}"),
        ("CLCE_VERSION", VERSION),
        ("CLCE_BUILD_TORCH", torch.__version__),
    ]
    if IS_X86:
        defined.append(("CLCE_X86_TILES", None))
    if WITH_CUDA:
        archs = re.findall(r"arch=compute_\w+,code=(\w+)", " ".join(cpp_extension._get_cuda_arch_flags()))
        archs += [kind for kind in flags_of_their_own() if kind.startswith("sm_") and kind not in archs]
        defined += [
            ("CLCE_CUDA", None),
            ("USE_CUDA", None),  # torch's headers declare what concerns CUDA
            ("CLCE_BUILD_CUDA", torch.version.cuda),
            ("CLCE_BUILD_ARCHS", "+".join(archs)),
        ]
    return defined


def extension():
    sources = [
        *(
            f"csrc/cpu/{name}.cpp"
            for name in ("prepare", "forward", "loss", "backward", "rows", "capability", "tile_default")
        ),
        *(f"csrc/binding/{name}.cpp" for name in ("tensors", "devices", "calls", "ops", "facts")),
    ]
    flags = {"cxx": list(CXX_FLAGS)}
    # The C++ runtime comes first: libtorch_cpu.so exports parts of it too, which it need not have tomorrow.
    libraries, folders = ["stdc++", "torch_cpu"], cpp_extension.library_paths()
    if WITH_CUDA:
        sources += ["csrc/binding/product.cpp", *cuda_sources()[""]]
        flags["nvcc"] = list(NVCC_FLAGS)
        # The runtime becomes a part of the library, which then runs with torch's whatever version that has.
        libraries += ["cudart_static", "dl", "rt", "pthread"]
        folders.append(os.path.join(CUDA_HOME, "lib64"))
    link = []
    if platform.system() == "Linux":
        # libtorch.so, though nothing of its own is used, loads the libtorch_cuda.so that there may be.
        link = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-Wl,--exclude-libs,ALL", "-Wl,-z,defs"]
    elif platform.system() == "Darwin":
        link = ["-Wl,-undefined,dynamic_lookup"]
    return Extension(
        "clce_ext.libclce_ext",
        sources,
        language="c++",
        include_dirs=[
            str(ROOT / "csrc"),
            *cpp_extension.include_paths(device_type="cuda" if WITH_CUDA else "cpu"),
        ],
        library_dirs=folders,
        libraries=libraries,
        define_macros=macros(),
        extra_compile_args=flags,
        extra_link_args=link,
    )


class BuildExtension(cpp_extension.BuildExtension):
    """Compiles the sources that have flags of their own, and says at the end what was built."""

    def build_extension(self, ext):
        for kind, (sources, flags) in flags_of_their_own().items():
            ext.extra_objects += self.compiler.compile(
                sources,
                output_dir=os.path.join(self.build_temp, kind),
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=flags,
            )
        super().build_extension(ext)

    def run(self):
        super().run()
        if not self.extensions:
            return
        what = "CPU and CUDA kernels" if WITH_CUDA else "CPU kernels only"
        print(f"clce_ext {VERSION}: built with {what} ({WHY})")


class Wheel(bdist_wheel):
    """A wheel for every Python 3: no Python is compiled in."""

    def get_tag(self):
        _, _, system = super().get_tag()
        return "py3", "none", system


if not has_compiler():
    if os.environ.get("CLCE_CUDA") in ("1", "on", "yes"):
        raise SystemExit(
            "CUDA kernels are asked for, but there is no C++ compiler (c++, g++, clang++ or $CXX)"
        )
    print(f"clce_ext {VERSION}: built without kernels (no C++ compiler: c++, g++, clang++ or $CXX)")
setup(
    ext_modules=[extension()] if has_compiler() else [],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True), "bdist_wheel": Wheel},
)
