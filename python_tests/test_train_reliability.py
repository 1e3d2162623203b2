"""What a run survives, and what it refuses: two commands in one folder, damaged files, full disks, lost
processes. docs/reliability.md lists the promises."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clce_ext.train import checkpoint
from clce_ext.train.checkpoint import checkpoints, read_weights
from clce_ext.train.cli import main
from clce_ext.train.config import TrainConfig
from clce_ext.train.errors import TrainingError
from clce_ext.train.loop import train
from clce_ext.train.results import read_run
from clce_ext.train.run_folder import opened, run_id

from .training import QUICK, command_line, quick_config, results, without_times, write_digit_images

ROOT = Path(__file__).resolve().parent.parent
TINY = QUICK | {"shots": 2, "batch_size": 10, "images_per_class": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(quick_config(folder), with_map=False)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def again(run, **options):
    return train(quick_config(run, **options), with_map=False)


def flip(path, share=0.5):
    """One bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 4
    path.write_bytes(content)


# One run in a folder


def hold(folder):
    """A process that works in ``folder``, and has a child as a run has loaders."""
    code = """
import os, sys, time
from pathlib import Path
from clce_ext.train.config import TrainConfig
from clce_ext.train.run_folder import opened
with opened(Path(sys.argv[1]), TrainConfig()):
    if os.fork() == 0:
        time.sleep(3)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_command_in_one_output_folder_is_refused_by_pid_and_host(tmp_path, capsys):
    holder = hold(tmp_path)
    try:
        assert main([*command_line(TINY | {"seed": 1}), "--output", str(tmp_path)]) == 2
    finally:
        holder.kill()
        holder.communicate()
    error = capsys.readouterr().err
    assert f"process {holder.pid} on {os.uname().nodename} is at work there" in error
    assert error.count("\n") == 1


def test_the_lock_of_a_killed_command_is_taken_over(tmp_path):
    """Though loader processes of it live on for a while."""
    holder = hold(tmp_path)
    holder.kill()
    holder.wait()
    with opened(tmp_path, quick_config(tmp_path)) as found:
        assert found is None


def test_two_runs_in_one_process_notice_each_other(tmp_path):
    config = quick_config(tmp_path)
    refused = pytest.raises(TrainingError, match=f"process {os.getpid()} on .* is at work there")
    with opened(tmp_path, config), refused, opened(tmp_path, config):
        pass
    with opened(tmp_path, config) as found:
        assert found is None


# What lies in the folder


@pytest.mark.parametrize("resume", [False, True])
def test_checkpoints_without_config_are_refused(run, resume):
    (run / "results.json").unlink()
    (run / "config.yaml").unlink()
    with pytest.raises(TrainingError, match="--overwrite"):
        again(run, resume=resume, seed=5)
    again(run, overwrite=True, seed=5)
    assert results(run)["seed"] == 5


def test_checkpoints_of_another_run_are_refused(run, tmp_path):
    """Though config.yaml says that they are this run's."""
    again(tmp_path / "other", seed=5)
    (run / "results.json").unlink()
    shutil.copy(tmp_path / "other/config.yaml", run)
    with pytest.raises(TrainingError, match=r"no checkpoint is left .* belongs to a run with other options"):
        again(run, resume=True, seed=5)


@pytest.mark.parametrize(
    "name, share", [("model.safetensors", 0.9), ("training.pt", 0.5), ("checksums.json", 0.5)]
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(finished, run, capsys, name, share):
    (run / "results.json").unlink()
    before, newest = checkpoints(run)
    flip(newest / name, share)
    again(run, resume=True)
    error = capsys.readouterr().err
    assert f"{newest} " in error and "damaged" in error and f"going on from {before}" in error
    assert without_times(results(run)) == without_times(results(finished))


def test_where_every_checkpoint_is_damaged_they_are_named(run):
    (run / "results.json").unlink()
    before, newest = checkpoints(run)
    flip(newest / "training.pt")
    (before / "training.pt").write_bytes(b"")
    with pytest.raises(
        TrainingError, match=r"step-00000004 training.pt is damaged .*step-00000002 training.pt"
    ):
        again(run, resume=True)


def test_a_checkpoint_of_another_version_is_refused_in_words(run, monkeypatch):
    (run / "results.json").unlink()
    load = checkpoint.load_checkpoint
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda folder: (load(folder)[0], {"position": {}}))
    with pytest.raises(TrainingError, match=r"--resume: .*step-00000004 was written by another version"):
        again(run, resume=True)


def test_an_option_that_is_added_later_leaves_checkpoints_their_run(tmp_path, monkeypatch):
    configs = quick_config(tmp_path), quick_config(tmp_path, seed=1)
    before = [run_id(config) for config in configs]
    to_dict = TrainConfig.to_dict
    monkeypatch.setattr(TrainConfig, "to_dict", lambda self: to_dict(self) | {"added_later": None})
    assert [run_id(config) for config in configs] == before and before[0] != before[1]


@pytest.mark.parametrize(
    "name, damage",
    [
        ("results.json", flip), ("model.safetensors", Path.unlink), ("model.safetensors", flip),
        ("correct.safetensors", Path.unlink), ("metrics.csv", flip),
    ],
    ids=["results", "no model", "model", "no correct", "metrics"],
)  # fmt: skip
def test_a_damaged_finished_run_finishes_again(finished, run, capsys, name, damage):
    damage(run / name)
    figures = again(run, resume=True)
    assert f"finished before, but {name} " in capsys.readouterr().err
    assert without_times(figures) == without_times(results(finished))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert again(run, resume=True) == figures


def test_a_damaged_finished_run_without_checkpoints_says_so(run):
    shutil.rmtree(run / "checkpoints")
    flip(run / "model.safetensors")
    with pytest.raises(TrainingError, match=r"model.safetensors is damaged .*no checkpoint .*--overwrite"):
        again(run, resume=True)


def test_a_run_killed_while_its_report_is_drawn_finishes_again(run, monkeypatch):
    def interrupted(*_, **__):
        assert (run / "results.json").exists()
        raise KeyboardInterrupt

    (run / "results.json").unlink()
    (run / "report.html").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("clce_ext.train.report.write_run_report", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again(run, resume=True)
    again(run, resume=True)
    assert (run / "report.html").exists()


def test_damaged_results_are_one_line_for_those_who_read_them(run):
    (run / "results.json").write_text('{"objective": "cl')
    with pytest.raises(TrainingError, match=r"not what a finished run leaves .* --resume finishes it again"):
        read_run(run)


def test_overwriting_removes_the_results_first(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("clce_ext.train.run_folder.shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        again(run, overwrite=True, seed=5)
    assert not (run / "results.json").exists() and (run / "config.yaml").exists()


# Disks and sizes


def test_a_full_disk_is_one_line_and_the_run_can_be_resumed(finished, tmp_path, capsys, monkeypatch):
    arguments = [*command_line(QUICK), "--output", str(tmp_path / "run")]
    flush, written = checkpoint._flush, []

    def full(path):
        written.append(path)
        if len(written) == 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    monkeypatch.setattr(checkpoint, "_flush", full)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "cannot be written (No space left on device; " in error and error.count("\n") == 1
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert main([*arguments, "--resume"]) == 0
    assert without_times(results(tmp_path / "run")) == without_times(results(finished))


@pytest.mark.parametrize("limit", [1_000, 2_500_000])
def test_writers_that_fail_midway_are_one_line(tmp_path, limit):
    """Files may not grow beyond ``limit`` bytes: the system fails torch's and safetensors' own writing."""
    done = subprocess.run(
        [sys.executable, "-m", "clce_ext.train", *command_line(TINY | {"epochs": 1}), "--output", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_weights_that_unpack_to_gigabytes_are_refused(tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"x": torch.zeros(4)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file, file.open("bomb/data/1", "w") as entry:
        for _ in range(400):
            entry.write(bytes(1 << 20))
    assert path.stat().st_size < 2**20
    with pytest.raises(
        TrainingError, match=r"bomb.pth: unpacks to 419 MB, more than .* ten times the model's"
    ):
        train(quick_config(tmp_path / "run", checkpoint=str(path)))
    assert read_weights(path)["x"].shape == (4,)  # torch itself does not look at what nobody asks for


def test_a_beta_that_is_not_finite_is_one_line_that_names_the_option(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    for value in (".inf", ".nan", "1e6"):
        recipe.write_text(f"beta: {value}\n")
        assert main(["--config", str(recipe), "--output", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert "--beta must be a number in [0, 10000], got " in error and error.count("\n") == 1


# Several processes


def torchrun(tmp_path, script, *arguments):
    path = tmp_path / "ranks.py"
    path.write_text(
        f"import os, sys\nfrom clce_ext.train.cli import main\nrank = int(os.environ['RANK'])\n{script}"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, path, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_ranks_with_other_options_are_refused(tmp_path):
    arguments = [*command_line(TINY), "--output", tmp_path / "run"]
    done = torchrun(tmp_path, "sys.exit(main(sys.argv[1:] + ['--lr', str(1 + rank)]))", *arguments)
    assert done.returncode != 0
    assert "process 1 was given other options than process 0: lr 2.0, not 1.0" in done.stderr


def test_ranks_with_other_images_are_refused(tmp_path):
    """As many images, of the same names, under the same path: another machine's disk."""
    for rank in (0, 1):
        folder = write_digit_images(tmp_path / f"disk{rank}/data", train=6 + rank, val=2, classes=2, size=8)
        if rank:
            for split in ("train/digit_0", "train/digit_1"):
                sorted((folder / split).iterdir())[0].unlink()
    arguments = [*command_line(TINY), "--data", "data", "--batch-size", 4, "--output", tmp_path / "run"]
    done = torchrun(
        tmp_path, f"os.chdir(r'{tmp_path}/disk' + str(rank))\nsys.exit(main(sys.argv[1:]))", *arguments
    )
    assert done.returncode != 0
    assert "process 1 found other data than process 0" in done.stderr and "train was 4 images" in done.stderr


def test_a_killed_rank_ends_the_run_with_one_line(tmp_path):
    script = """
from clce_ext.train.loop import _Run
import signal
steps = _Run._end_epoch
def killed(self, *arguments):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return steps(self, *arguments)
_Run._end_epoch = killed
sys.exit(main(sys.argv[1:]))
"""
    start = time.monotonic()
    done = torchrun(tmp_path, script, *command_line(TINY), "--output", tmp_path / "run")
    assert done.returncode != 0 and time.monotonic() - start < 60
    ours = [line for line in done.stderr.splitlines() if line.startswith("clce-train: error: ")]
    assert len(ours) <= 1 and all("another process of the run has ended" in line for line in ours)
    assert "clce_ext/train/loop.py" not in done.stderr  # no traceback of ours


def test_a_rank_that_does_not_answer_ends_the_run_after_the_timeout(tmp_path):
    script = """
from clce_ext.train.loop import _Run
import time
end = _Run._end_epoch
def asleep(self, *arguments):
    if rank == 1:
        time.sleep(60)
    return end(self, *arguments)
_Run._end_epoch = asleep
sys.exit(main(sys.argv[1:]))
"""
    start = time.monotonic()
    done = torchrun(tmp_path, script, *command_line(TINY), "--timeout", 3, "--output", tmp_path / "run")
    assert done.returncode != 0 and time.monotonic() - start < 50
    assert "did not answer within --timeout 3 seconds" in done.stderr
