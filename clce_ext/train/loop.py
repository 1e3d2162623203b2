"""A run from its options to its results: stages, epochs, checkpoints, resuming."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from . import checkpoint, judge, models, report
from .config import METRICS, TrainConfig
from .data import Data, data_digest, in_memory, load_data
from .errors import TrainingError, differences, first_line
from .objectives import OBJECTIVES
from .processes import Processes, device_name, processes
from .progress import progress, waiting
from .records import Records, epoch_line, percentages
from .results import write_figures
from .run_folder import lasting_options, opened, run_id, write_finished
from .seeds import seed_all
from .stages import Stage, stages
from .start import plan, start_lines, versions
from .trainer import RunningLosses, Trainer

_CHECK_EVERY = {"cpu": 1, "cuda": 50}  # steps; in between the host does not wait for a GPU's losses


def train(config: TrainConfig, with_map: bool = True) -> dict[str, Any]:
    """Runs ``config`` and returns what it writes to ``results.json``; ``with_map``: draw its embeddings.

    ``config.output`` then holds config.yaml, metrics.csv, tensorboard/, checkpoints/, model.safetensors (the
    backbone, as timm loads it), embeddings.safetensors, results.json and report.html.

    Raises:
        TrainingError: anything that the user can put right, a loss that is not finite among it.
    """
    with processes(config) as group:
        if config.plan:
            if group.is_main:
                print(plan(config, group.world_size))
            return {}
        options = lasting_options(config)
        group.agree("was given other options", options, "{name} {now!r}, not {before!r}")
        folder = Path(config.output)
        with opened(folder, config) if group.is_main else nullcontext() as found:
            finished = group.from_main(found)
            if finished is None:
                return _Run(config, group, folder, with_map).execute()
            if group.is_main:
                print(f"{folder}: finished before; nothing to do")
            return finished


@dataclass
class State:
    """Where a run stands: ``batch`` batches of ``epoch`` of ``stage`` are done; and what it has found so far.
    Every checkpoint holds it."""

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0  # updates since the run began
    epoch_seconds: float = 0.0
    seconds: float = 0.0  # of training, without evaluation
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.csv
    # Of which images the given backbone finds the class, before the first step.
    untouched: dict[str, Tensor] | None = None
    best: dict[str, Tensor] | None = None  # weights of the epoch that is best by --best-metric
    versions: list[dict[str, str]] = field(default_factory=list)  # that the run was made by, in their order


class _Run:
    def __init__(self, config: TrainConfig, group: Processes, folder: Path, with_map: bool) -> None:
        self.config, self.group, self.folder, self.with_map = config, group, folder, with_map
        self.is_shown = config.progress and group.is_main
        seed_all(config.seed)  # the same weights in every process
        self.data = self._load_data()
        self.digest = data_digest(self.data)
        group.agree("found other data", self.digest)
        self._check_that_test_chooses_nothing()
        self.data.train = in_memory(self.data.train, group.world_size)
        self.stages = stages(config, group.world_size)
        self.model = models.create_model(
            config, len(self.data.classes), OBJECTIVES[config.objective].projection, self.data.classes
        )
        self.model.to(group.device)
        self.judge = judge.Judge(config, self.model.input, group)
        self.val_outputs: judge.Outputs | None = None  # of the current weights, once evaluated
        self.state = State()
        self.losses = RunningLosses(group)  # of the current epoch
        self.trainer_state: dict[str, Any] | None = None  # from a checkpoint, until its stage begins
        newest = checkpoint.newest_intact(folder, run_id(config)) if config.resume and group.is_main else None
        newest = group.from_main(newest)
        if newest is not None:
            self._restore(newest)
        elif group.is_main:
            checkpoint.write_text(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
        if versions() not in self.state.versions:
            self.state.versions.append(versions())
        if self.is_shown:
            print(*start_lines(config, self.data, self.model), sep="\n", flush=True)
        self.records = Records(folder, config, self.state.rows) if group.is_main else None

    def _load_data(self) -> Data:
        """What --download fetches, the main process fetches; the others wait for it."""
        config, group = self.config, self.group
        if config.download and not group.is_main:
            group.from_main(None)
        data = load_data(config)
        if config.download and group.is_main:
            group.from_main(None)
        return data

    def _check_that_test_chooses_nothing(self) -> None:
        if self.data.watched != "test":
            return
        if self.config.best_metric:
            raise TrainingError(
                "--best-metric chooses by the validation split, and there is none; the test split must "
                "choose nothing. --val-fraction 0.1 validates on a tenth of the training images"
            )
        if self.group.is_main:
            print(
                "clce-train: warning: no validation split: curves and figures are of the test split. They "
                "must choose nothing, neither options nor epochs; --val-fraction gives a split that may",
                file=sys.stderr,
            )

    def execute(self) -> dict[str, Any]:
        config, state = self.config, self.state
        with nullcontext() if self.records is None else self.records:
            if config.has_weights and state.untouched is None and config.eval_embeddings != "never":
                val = self.judge.outputs(self.model, self.data.val)
                state.untouched = self.judge.frozen(self.model, self.data.train, val)
                if self.is_shown:
                    print(f"before   {percentages(judge.accuracies(state.untouched))}, untouched", flush=True)
            for stage in self.stages[state.stage :]:
                self._train_stage(stage)
                state.stage, state.epoch = state.stage + 1, 0
            return self._finish()

    def _train_stage(self, stage: Stage) -> None:
        trainer = Trainer(stage, self.model, self.data, self.config, self.group)
        if self.trainer_state is not None:
            trainer.restore(self.trainer_state)
            self.trainer_state = None
        while self.state.epoch < stage.epochs and not self._is_patience_over():
            self._train_epoch(trainer)
            self._end_epoch(trainer)
        if trainer.averaged is not None:
            self.model.load_state_dict(trainer.averaged.module.state_dict())

    def _is_patience_over(self) -> bool:
        """Whether the last --patience evaluations of the last stage have not bettered what was before."""
        rows, patience = self._judged_rows(), self.config.patience
        return bool(patience and rows) and rows.index(self._best_row()) < len(rows) - patience

    def _judged_rows(self) -> list[dict[str, Any]]:
        """Those to choose from: of the last stage; an earlier one always goes on to its end."""
        last, metric = self.stages[-1].name, self.config.best_metric
        return [row for row in self.state.rows if row["stage"] == last and metric in row]

    def _best_row(self) -> dict[str, Any] | None:
        """The first of those with the best --best-metric."""
        metric = self.config.best_metric
        return METRICS[metric](self._judged_rows(), key=lambda row: row[metric], default=None)

    def _train_epoch(self, trainer: Trainer) -> None:
        config, state, stage, sampler = self.config, self.state, trainer.stage, trainer.sampler
        self.val_outputs = None
        check_every, save_every = _CHECK_EVERY[self.group.device.type], config.checkpoint_steps
        start = time.perf_counter()  # to start the loader's processes is part of an epoch
        # Every stage draws its own order of images, so the sampler counts the epochs of all stages.
        trainer.start_epoch(state.epoch + sum(s.epochs for s in self.stages[: state.stage]), state.batch)
        bar = progress(
            f"{stage.name} {state.epoch + 1}/{stage.epochs}",
            shown=self.is_shown,
            total=sampler.steps * sampler.batch_size,
            initial=state.batch * sampler.batch_size,
            unit="img",
            unit_scale=True,
        )
        with bar:
            while state.batch < sampler.steps:
                is_last = state.batch + 1 == sampler.steps
                saves = save_every is not None and (state.step + 1) % save_every == 0 and not is_last
                # Dropout, drop-path and mixup are functions of (seed, process, step): a resumed run repeats
                # them.
                seed_all(config.seed, self.group.rank, state.step)
                losses = trainer.gradients(state.batch + state.epoch * sampler.steps)
                self.losses.add(losses, sampler.share, state.step)
                if is_last or saves or (state.step + 1) % check_every == 0:
                    bar.set_postfix(self._checked_losses(trainer), refresh=False)
                trainer.update()
                state.batch, state.step = state.batch + 1, state.step + 1
                state.epoch_seconds += time.perf_counter() - start
                bar.update(sampler.batch_size)
                if saves:
                    self._check_weights(trainer)
                    self._save(trainer)
                start = time.perf_counter()

    def _checked_losses(self, trainer: Trainer) -> dict[str, float]:
        """The losses of this step; all processes stop if those of one of them were not finite since the last
        time."""
        last, odd = self.losses.read()
        if odd is None:
            return last
        step, losses = odd
        values = ", ".join(f"{name} {value}" for name, value in losses.items())
        raise self._diverged(trainer, f"the loss is not finite ({values})", step)

    def _check_weights(self, trainer: Trainer) -> None:
        """Before they are judged or saved: a gradient may overflow where the loss did not. Waits for the
        device; all processes have the same weights."""
        parameters = [p.detach() for p in trainer.model.parameters()]
        if not torch.stack([p.isfinite().all() for p in parameters]).all():
            raise self._diverged(trainer, "the update left weights that are not finite", self.state.step - 1)

    def _diverged(self, trainer: Trainer, what: str, step: int) -> TrainingError:
        return TrainingError(
            f"{what} in stage {trainer.stage.name}, epoch {self.state.epoch + 1}, step {step}, at learning "
            f"rate {trainer.learning_rate:.3g}; the weights before this step are untouched in the last "
            "checkpoint. Try a lower --lr, --clip-grad 1, longer --warmup-epochs, or --amp bfloat16 or none "
            "in place of float16"
        )

    def _end_epoch(self, trainer: Trainer) -> None:
        """Evaluates, writes the epoch's row, and a checkpoint where one is due."""
        start = time.perf_counter()
        self._check_weights(trainer)
        config, state, stage, sampler = self.config, self.state, trainer.stage, trainer.sampler
        is_last = state.epoch + 1 == stage.epochs
        judged = is_last or (state.epoch + 1) % config.eval_every == 0
        row = {
            "stage": stage.name,
            "epoch": state.epoch,
            "step": state.step,
            "lr": trainer.learning_rate,
            **self.losses.means(),
            **(self._evaluate(trainer) if judged else {}),
            "seconds": round(state.epoch_seconds, 3),
            "images_per_second": round(
                sampler.steps * sampler.batch_size / max(state.epoch_seconds, 1e-9), 1
            ),
        }
        state.seconds += state.epoch_seconds
        state.epoch, state.batch, state.epoch_seconds = state.epoch + 1, 0, 0.0
        self.losses = RunningLosses(self.group)
        state.rows.append(row)
        if config.best_metric and self._best_row() is row:
            weights = trainer.evaluated_model.state_dict()
            state.best = {name: value.detach().cpu().clone() for name, value in weights.items()}
        if self.records is not None:
            self.records.write(state.rows)
        if self.is_shown:
            left = sum(s.epochs for s in self.stages[state.stage :]) - state.epoch
            each = row["seconds"] + time.perf_counter() - start  # with what judging takes
            print(epoch_line(row, stage.epochs, left * each), flush=True)
        if is_last or state.epoch % config.checkpoint_epochs == 0:
            self._save(trainer)

    def _evaluate(self, trainer: Trainer) -> dict[str, Any]:
        model = trainer.evaluated_model
        val = self.val_outputs = self.judge.outputs(model, self.data.val)
        values: dict[str, Any] = {}
        if trainer.stage.mode != "contrast":
            values |= val.classification(len(self.data.classes))
        if self.config.eval_embeddings == "epoch":
            values |= judge.accuracies(self.judge.frozen(model, self.data.train, val, probe=False))
        if trainer.stage is self.stages[-1] and (metric := self.config.best_metric) not in (None, *values):
            raise TrainingError(f"--best-metric {metric}: the evaluation of this run gives no such figure")
        return values

    def _finish(self) -> dict[str, Any]:
        config, state, data = self.config, self.state, self.data
        if state.best is not None:
            if self.group.is_main:
                self._write_backbone("last.safetensors")
            self.model.load_state_dict(state.best)
            self.val_outputs = None
        figures, val, correct = self.judge.figures(
            self.model, data, data.watched, state.untouched, self.val_outputs
        )
        results: dict[str, Any] = {
            **{name: getattr(config, name) for name in ("objective", "model", "data", "seed")},
            **{k: ", then ".join(dict.fromkeys(v[k] for v in state.versions)) for k in versions()},
            "processes": self.group.world_size,
            "device": device_name(self.group.device),
            "data_digest": self.digest,
            "classes": len(data.classes),
            "train_images": len(data.train),
            "epochs": len(state.rows),
            "steps": state.step,
            "seconds": round(state.seconds, 3),
            "seconds_per_epoch": round(state.seconds / max(1, len(state.rows)), 4),
        }
        if config.best_metric and state.rows:  # --epochs 0 leaves nothing to choose from
            best = state.rows.index(self._best_row())
            results |= {"best_metric": config.best_metric, "best_epoch": best + 1}
        results |= figures
        if not self.group.is_main:
            return results
        self.records.finish(figures, state.step)
        folder, part = self.folder, None if config.eval_embeddings == "never" else self.judge.part(val)
        (folder / "checksums.json").unlink(missing_ok=True)  # of a run that is finished again
        self._write_backbone("model.safetensors")
        write_figures(folder, results, part, correct)
        with waiting("drawing the report", self.is_shown):
            report.write_run_report(
                folder, config, results, state.rows, data.classes, part, data.val, self.with_map
            )
        write_finished(folder, config)  # last: a run killed before it is finished again
        if self.is_shown:
            print(f"{data.watched:<9}{percentages(results)}")
            print(f"report: {folder / 'report.html'}")
        return results

    def _write_backbone(self, name: str) -> None:
        metadata = {
            "model": self.model.architecture,
            "classes": json.dumps(self.data.classes),
            "input": json.dumps(self.model.input),
            "arguments": json.dumps(self.model.arguments),
            "global_pool": self.config.global_pool or "",
            "format": "pt",
        }
        checkpoint.write_weights(self.folder / name, self.model.backbone.state_dict(), metadata)

    def _save(self, trainer: Trainer) -> None:
        """All processes call this together."""
        state = trainer.state() | {
            "run": vars(self.state),
            "sums": self.group.gather(self.losses.sums),
            "world_size": self.group.world_size,
            "data": self.digest,
        }
        if self.group.is_main:
            weights, keep = self.model.state_dict(), self.config.keep_checkpoints
            run = run_id(self.config)
            checkpoint.save_checkpoint(self.folder, self.state.step, weights, state, keep, run)

    def _restore(self, folder: Path) -> None:
        weights, state = checkpoint.load_checkpoint(folder)
        if "run" not in state:
            raise TrainingError(
                f"--resume: {folder} was written by another version of clce_ext, and only that goes on; "
                "--overwrite (without --resume) starts again"
            )
        if state["world_size"] != self.group.world_size:
            raise TrainingError(
                f"{folder}: written by {state['world_size']} process(es); resume with as many, not "
                f"{self.group.world_size}: the batches would differ"
            )
        if changed := differences(state["data"], self.digest):
            raise TrainingError(f"--resume: {folder} was trained on other data than is there now: {changed}")
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise TrainingError(f"{folder}: not a checkpoint of this model: {first_line(error)}") from error
        # Checkpoints of before versions were kept say nothing of them.
        unknown = [dict.fromkeys(versions(), "unknown")]
        self.state = State(**({"versions": unknown} | state["run"]))
        self.losses = RunningLosses(self.group, state["sums"][self.group.rank])
        self.trainer_state = state
        if self.is_shown:
            print(f"resuming from {folder}")
