"""Processes that wait for work: one launch (seconds) serves many tests across ranks."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist


class Failed(Exception):
    """What a rank raised: ``kind`` is the exception's class name."""

    def __init__(self, kind: str, text: str):
        super().__init__(f"{kind}: {text}")
        self.kind, self.text = kind, text


def _serve(rank: int, size: int, store: str, timeout: float, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = function(*args)
        except Exception as error:
            answer = Failed(type(error).__name__, str(error))
        pipe.send_bytes(pickle.dumps((answer.kind, answer.text) if isinstance(answer, Failed) else [answer]))


class World:
    """``size`` gloo ranks, each a process of its own with one thread."""

    def __init__(self, size: int, store: str, timeout: float = 60):
        context = multiprocessing.get_context("spawn")
        ends = [context.Pipe() for _ in range(size)]
        self.pipes = [end for end, _ in ends]
        self.processes = [
            context.Process(target=_serve, args=(rank, size, str(store), timeout, end), daemon=True)
            for rank, (_, end) in enumerate(ends)
        ]
        for process in self.processes:
            process.start()
        for _, end in ends:
            end.close()

    def run(
        self, function: Callable, args: dict[int, tuple], patience: float = 120, check: bool = True
    ) -> dict:
        """``function(*args[rank])`` on those ranks. Without check, failures are among the answers."""
        for rank, given in args.items():
            self.pipes[rank].send_bytes(pickle.dumps((function, given)))
        answers = {}
        for rank in args:
            try:
                if not self.pipes[rank].poll(patience):
                    raise TimeoutError(f"rank {rank} has not answered in {patience} s")
                answer = pickle.loads(self.pipes[rank].recv_bytes())
                answers[rank] = answer[0] if isinstance(answer, list) else Failed(*answer)
            except EOFError:
                answers[rank] = Failed("died", "")
        failures = [f"rank {rank}: {a}" for rank, a in answers.items() if isinstance(a, Failed)]
        if check and failures:
            raise AssertionError("\n".join(failures))
        return answers

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()


_groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}


def make_group(members: tuple[int, ...], timeout: float | None = None):
    """On every rank of the world: a process group for :func:`group_of`."""
    limit = None if timeout is None else timedelta(seconds=timeout)
    _groups[members] = dist.new_group(list(members), timeout=limit)


def group_of(members: tuple[int, ...]):
    """The group of these ranks; None, the default group, where they are the whole world."""
    if members in _groups:
        return _groups[members]
    assert len(members) == dist.get_world_size()
    return None


def die(code: int = 1):
    sys.stdout.flush()
    os._exit(code)
