"""tools/gpu_check.py, without a GPU: limits, time-outs, and results that outlive a failure."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import gpu_check  # noqa: E402
import sanitizer_suite  # noqa: E402
import sass  # noqa: E402

from python_tests.test_gpu import launches_in, number, planned_blocks  # noqa: E402


def sass_missing() -> bool:
    try:
        sass.find_nvcc()
    except SystemExit:
        return True
    return False


MACHINE = {
    "gpu": "NVIDIA H100", "capability": "9.0", "nvcc": "nvcc", "torch": "2.11", "compute-sanitizer": "tool",
}  # fmt: skip


def python(code: str, name: str = "step", limit: float = 30, **options) -> gpu_check.Step:
    return gpu_check.Step(name, [sys.executable, "-c", code], limit, **options)


@pytest.fixture
def check(tmp_path, monkeypatch) -> gpu_check.Check:
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    (tmp_path / "results").mkdir()
    return gpu_check.Check(MACHINE, tmp_path / "results", tmp_path / "out.tar.gz", rehearse=False)


def steps_for_a_gpu(tmp_path) -> dict[str, list]:
    return {part: gpu_check.all_steps([part], MACHINE, False, tmp_path, tmp_path) for part in gpu_check.PARTS}


def names_in(archive: Path) -> set[str]:
    with tarfile.open(archive) as tar:
        return {Path(name).name for name in tar.getnames()}


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "XZ"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_time_out_kills_all_that_a_step_started(check, tmp_path):
    """Also a child that does not listen."""
    pid = tmp_path / "pid"
    child = (
        "import os, pathlib, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    begin = time.monotonic()
    check.run_all([[python(parent, limit=4)]])
    assert time.monotonic() - begin < 30
    (step,) = check.steps
    assert step["status"] == "failed" and step["detail"].startswith("stopped after 4 s")
    deadline = time.monotonic() + 10  # a signal is not waited for
    while is_alive(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int(pid.read_text()))


def test_a_step_is_asked_before_it_is_killed(check):
    """Even where signals of the keyboard are ignored, as in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = (
            "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what there is', flush=True)"
        )
        check.run_all([[python(code, limit=3)]])
    finally:
        signal.signal(signal.SIGINT, before)
    assert check.steps[0]["detail"] == "stopped after 3 s; what there is"


def test_every_result_outlives_a_later_failure(check, tmp_path):
    (check.results / "figures.csv").write_text("a,b\n")
    check.run_all(
        [
            [python("print('one is done')", "one")],
            [python("raise SystemExit('two is wrong')", "two"), python("print('at once')", "three")],
            [python("print('four is done')", "four")],
        ]
    )
    assert [step["status"] for step in check.steps] == ["passed", "failed", "passed", "passed"]
    assert check.steps[1]["detail"] == "two is wrong"
    logs = {"one.log", "two.log", "three.log", "four.log"}
    assert names_in(check.archive) >= logs | {"figures.csv", "check.json", "summary.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {"results", "out.tar.gz"}
    assert check.summary().endswith("failed: two")


def test_the_archive_is_there_after_the_first_step(check):
    seen, pack = [], check.pack

    def pack_and_look():
        pack()
        seen.append(names_in(check.archive))

    check.pack = pack_and_look
    check.run_all([[python("pass", "one")], [python("pass", "two")]])
    assert "one.log" in seen[0] and "two.log" not in seen[0] and "two.log" in seen[1]


def test_limits_fit_into_the_time_of_all(tmp_path):
    parts = steps_for_a_gpu(tmp_path)
    limits = {part: sum(map(gpu_check.seconds_of, groups)) for part, groups in parts.items()}
    assert sum(limits.values()) + 20 <= gpu_check.SECONDS
    assert limits["sanitizers"] >= 90
    assert list(parts) == ["build", "probe", "tests", "bench", "sanitizers"]


def test_what_is_left_over_goes_to_steps_that_stretch(check):
    """And never what a later step may take."""
    check.seconds = 100
    given = {}
    start = check.start

    def note_limit(step, limit):
        given[step.name] = limit
        return start(step, limit)

    check.start = note_limit
    groups = [
        [python("pass", "first", 10)],
        [python("pass", "bench", 20, stretches=True)],
        [python("pass", "last", 30, stretches=True)],
    ]
    check.run_all(groups)
    assert given["first"] == 10
    assert 60 < given["bench"] <= 70
    assert 80 < given["last"] < 100


def test_no_time_left(check):
    check.seconds = 0
    check.run_all([[python("pass")]])
    assert check.steps[0]["status"] == "failed" and check.steps[0]["detail"] == "no time left"


@pytest.mark.parametrize(("rehearse", "status"), [(False, "failed"), (True, "skipped")])
def test_what_is_missing(check, rehearse, status):
    check.machine, check.rehearse = MACHINE | {"gpu": None}, rehearse
    check.run_all([[python("pass", needs=("gpu", "kernels"))]])
    assert check.steps[0]["status"] == status
    assert not (check.results / "kernels.log").exists()  # which nobody would have to try


@pytest.mark.parametrize(
    ("code", "status"), [("print('they run')", "passed"), ("raise SystemExit('they do not load')", "failed")]
)
def test_kernels_are_asked_for_once_and_not_before_they_are_built(code, status, check, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "KERNELS", f"open({str(tmp_path / 'asked')!r}, 'a').write('x'); {code}")
    machine, check.machine = check.machine, dict(check.machine)
    check.run_all([[python("pass", "build")]])
    assert not (tmp_path / "asked").exists()
    check.run_all([[python("pass", name, needs=("gpu", "kernels"))] for name in ("tests", "bench")])
    assert [step["status"] for step in check.steps] == ["passed", status, status]
    assert (tmp_path / "asked").read_text() == "x" and "kernels" not in machine
    assert (check.results / "kernels.log").read_text().startswith("they ")
    for part, groups in steps_for_a_gpu(tmp_path).items():
        needed = {"kernels" in step.needs for group in groups for step in group}
        assert needed == {part not in ("build", "probe")}


def test_sources_without_their_repository_and_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CLCE_COMMIT", raising=False)
    assert gpu_check.commit() == "unknown"
    monkeypatch.setenv("CLCE_COMMIT", "abc")
    assert gpu_check.commit() == "abc"


def test_sanitizers(tmp_path):
    """All at once, deaf to errors of the API, with lines of the source. Only initcheck looks at a library's
    kernels too: what they write must not count as unwritten."""
    parts = steps_for_a_gpu(tmp_path)
    (group,) = parts["sanitizers"]
    assert [step.name for step in group] == list(gpu_check.SANITIZERS)
    for step in group:
        assert step.command[step.command.index("--report-api-errors") + 1] == "no"
        assert step.command[step.command.index("--tool") + 1] == step.name
        assert ("kns=clce" in step.command) == (step.name != "initcheck")
    ((build,),) = parts["build"]
    assert build.env["NVCC_APPEND_FLAGS"] == "-lineinfo"


def test_the_sanitizers_cases_reach_what_is_large():
    cases = sanitizer_suite.cases()
    for dtype in sanitizer_suite.HALF:
        assert any(case.dtype == dtype and case.rows >= 2100 and not case.keys for case in cases)
    # 34 rows of tiles in 32 groups, two steps each; 67 tiles of the other side for at most 16 shares.
    assert any(case.rows > 32 * 128 and case.dim > 64 and not case.options for case in cases)
    assert any(case.rows > 32 * 128 and case.options.get("temperature", 1) < 0.05 for case in cases)
    assert {case.engine for case in cases} == {None, "panels"}


ROOT = TOOLS.parent


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="an installation, no sources")
def test_what_ships_is_what_check_sass_looks_at():
    """sm_86 and sm_89 have no code of their own, whoever builds: they run sm_80's."""
    (shipped,) = re.findall(r'^DEFAULT_ARCHS = "(.+?)"', (ROOT / "setup.py").read_text(), re.M)
    looked_at = re.search(r'"--arch", .*default=\[(.*?)\]', (TOOLS / "check_sass.py").read_text())[1]
    assert re.findall(r"\d+\.\d+", shipped) == ["8.0", "9.0"]
    assert re.findall(r"\d+", looked_at) == ["80", "90"]
    cmake = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES (.*?)\)", (ROOT / "CMakeLists.txt").read_text())[1]
    assert re.findall(r"\d+", cmake) == ["80", "90"]


@pytest.mark.skipif(sass_missing(), reason="no CUDA toolkit")
@pytest.mark.parametrize(("gpus", "built"), [("[(8, 6), (8, 9), (9, 0)]", "8.0;9.0"), ("[(12, 0)]", "12.0")])
def test_a_build_for_the_gpus_of_a_machine(gpus, built):
    script = f"""if True:
        import os, runpy, sys, torch
        gpus = {gpus}
        torch.version.cuda = torch.version.cuda or "13.0"
        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: len(gpus)
        torch.cuda.get_device_capability = lambda i: gpus[i]
        sys.argv = ["setup.py", "--version"]
        runpy.run_path("setup.py")
        print(os.environ["TORCH_CUDA_ARCH_LIST"])"""
    environment = {key: value for key, value in os.environ.items() if key != "TORCH_CUDA_ARCH_LIST"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment | {"CLCE_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip().splitlines()[-1] == built, done.stderr


ROWS = (
    {"competitor": "ours", "status": "ok"},
    {"competitor": "eager", "status": "failed"},
    {"competitor": "ours", "status": "failed"},
)


@pytest.mark.parametrize(
    ("rows", "status", "passed"),
    [
        (ROWS[:1], 0, True),
        (ROWS[:2], 1, True),  # a competitor failed
        (ROWS[:2], None, True),  # and time ran out
        (ROWS, 1, False),
        (ROWS[1:2], 1, False),  # ours never ran
        (ROWS[:1], -11, False),
        ((), 1, False),
    ],
)
def test_one_failed_competitor_does_not_fail_the_benchmark(rows, status, passed, tmp_path):
    if rows:
        with (tmp_path / "bench.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["competitor", "status"])
            writer.writeheader()
            writer.writerows(rows)
    verdict, said = gpu_check.benchmark_judge(tmp_path / "bench")(status)
    assert verdict is passed
    assert ("eager" in said) == (ROWS[1] in rows)


def test_what_ncu_says_is_read():
    """As Nsight Compute prints it: notes of its own, a line of units, template arguments with their types."""
    forward = (
        "void clce::cuda::forward_kernel<clce::cuda::ForwardTraits<clce::cuda::HalfProduct<clce::ptx::bf16>, "
        "clce::cuda::sm80::ForwardShape<(int)128, (int)2, (int)4, (int)64, (int)2, (int)2, (int)4>, (bool)0>>"
        "(T1::Params)"
    )
    output = f"""==PROF== Connected to process 1
"ID","Process ID","Kernel Name","launch__occupancy_limit_warps"
"","","","block"
"0","1","{forward}","8"
"1","1","void clce::cuda::prepare_backward_kernel<clce::ptx::bf16>(T1)","16"
"""
    first, second = launches_in(output)
    assert number("233472") == number("233,472") == 233472
    assert planned_blocks(first["Kernel Name"]) == 2 and first["launch__occupancy_limit_warps"] == "8"
    assert planned_blocks(second["Kernel Name"]) is None
    resident = (
        "ResidentShape<clce::cuda::Fragment<128, 64, 4, 1>, clce::cuda::Fragment<128, 128, 4, 1>, 2, 1>"
    )
    assert (
        planned_blocks(f"void clce::cuda::backward_kernel<Traits<clce::cuda::sm80::{resident}, false> >") == 1
    )


def test_rehearsal(tmp_path):
    """As a command, with $OUT: planted failures are told, later parts run, one file is left."""
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--rehearse", "sanitizers"]
    environment = os.environ | {"OUT": str(tmp_path), "CLCE_COMMIT": "abc"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-check.tar.gz"]
    with tarfile.open(tmp_path / "gpu-check.tar.gz") as tar:
        said = tar.extractfile("gpu-check/summary.txt").read().decode()
    assert "commit abc" in said and "nothing failed" in said
    for line in ("passed  planted failure", "passed  planted time-out", "passed  sanitizer suite"):
        assert line in said
