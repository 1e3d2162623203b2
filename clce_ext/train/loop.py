"""A run from its options to its results: stages, epochs, checkpoints, resuming."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import checkpoint, judge, models, report
from .choice import best_row, is_patience_over
from .config import TrainConfig
from .data import Data, data_digest, digest_differences, in_memory, load_data
from .errors import TrainingError
from .losses import RunningLosses
from .objectives import OBJECTIVES, UNTOUCHED
from .plan import plan
from .processes import Processes, processes
from .records import Records, epoch_line, progress_bar
from .results import correct_tensors
from .run_folder import lasting_options, opened, run_id, write_finished
from .seeds import seed_all
from .stages import Stage, stages
from .start import start_lines, versions
from .trainer import Trainer

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
        group.agree(lasting_options(config))
        folder = Path(config.output)
        with opened(folder, config) if group.is_main else nullcontext() as found:
            finished = group.from_main(found)
            if finished is None:
                return _Run(config, group, folder, with_map).execute()
            if group.is_main:
                print(f"{folder}: finished before; nothing to do")
            return finished


@dataclass
class Position:
    """Where a run stands: ``batch`` batches of ``epoch`` of ``stage`` are done."""

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0  # updates since the run began
    epoch_seconds: float = 0.0
    seconds: float = 0.0  # of training, without evaluation


class _Run:
    def __init__(self, config: TrainConfig, group: Processes, folder: Path, with_map: bool) -> None:
        self.config, self.group, self.folder, self.with_map = config, group, folder, with_map
        seed_all(config.seed)  # the same weights in every process
        self.data: Data = group.main_first(load_data, config) if config.download else load_data(config)
        self.digest = self._agreed_digest()
        self._check_that_test_chooses_nothing()
        self.data.train = in_memory(self.data.train, group.world_size)
        self.stages = stages(config, group.world_size)
        self.model = models.create_model(
            config, len(self.data.classes), OBJECTIVES[config.objective].projection, self.data.classes
        )
        self.model.to(group.device)
        self.input = models.input_config(self.model, config)
        self.judge = judge.Judge(config, self.input, group)
        self.val_outputs: judge.Outputs | None = None  # of the current weights, once evaluated
        self.position = Position()
        self.losses = RunningLosses(group)  # of the current epoch
        self.rows: list[dict[str, Any]] = []  # of metrics.csv
        # Of which images the given backbone finds the class, before the first step.
        self.untouched: dict[str, Tensor] | None = None
        self.best: dict[str, Tensor] | None = None  # weights of the epoch that is best by --best-metric
        self.trainer_state: dict[str, Any] | None = None  # from a checkpoint, until its stage begins
        newest = checkpoint.newest_intact(folder, run_id(config)) if config.resume and group.is_main else None
        newest = group.from_main(newest)
        if newest is not None:
            self._restore(newest)
        elif group.is_main:
            checkpoint.write_text(folder / "config.yaml", config.dump())
        if group.is_main and config.progress:
            print(*start_lines(config, self.data, self.model), sep="\n", flush=True)
        self.records = None
        if group.is_main:
            self.records = Records(folder, config.tensorboard, self.rows, config.tracker, config.to_dict())

    def _agreed_digest(self) -> dict[str, str]:
        digests = self.group.gather(data_digest(self.data))
        for rank, other in enumerate(digests):
            if difference := digest_differences(digests[0], other):
                raise TrainingError(
                    f"--data {self.config.data}: process {rank} found other data than process 0: {difference}"
                )
        return digests[0]

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

    # The run

    def execute(self) -> dict[str, Any]:
        try:
            if self.config.has_weights and self.untouched is None and self.config.eval_embeddings != "never":
                self.untouched = self._judge_embeddings(self.judge.outputs(self.model, self.data.val))
            while self.position.stage < len(self.stages):
                self._train_stage(self.stages[self.position.stage])
                self.position = dataclasses.replace(
                    self.position, stage=self.position.stage + 1, epoch=0, batch=0, epoch_seconds=0.0
                )
            return self._finish()
        finally:
            if self.records is not None:
                self.records.close()

    def _train_stage(self, stage: Stage) -> None:
        trainer = Trainer(stage, self.model, self.data, self.config, self.input, self.group)
        if self.trainer_state is not None:
            trainer.restore(self.trainer_state)
            self.trainer_state = None
        while self.position.epoch < stage.epochs and not self._is_patience_over(stage):
            self._train_epoch(trainer)
            self._end_epoch(trainer)
        if trainer.averaged is not None:
            self.model.load_state_dict(trainer.averaged.module.state_dict())

    def _is_patience_over(self, stage: Stage) -> bool:
        metric, patience = self.config.best_metric, self.config.patience
        return patience is not None and is_patience_over(self._rows_to_choose_from(stage), metric, patience)

    def _rows_to_choose_from(self, stage: Stage) -> list[dict[str, Any]]:
        """The rows so far of the last stage; an earlier stage always goes on to its end."""
        return [row for row in self.rows if row["stage"] == stage.name] if stage is self.stages[-1] else []

    # An epoch

    def _train_epoch(self, trainer: Trainer) -> None:
        position, stage, sampler = self.position, trainer.stage, trainer.sampler
        self.val_outputs = None
        check_every = _CHECK_EVERY[self.group.device.type]
        # Every stage draws its own order of images, so the sampler counts the epochs of all stages.
        epoch = position.epoch + sum(s.epochs for s in self.stages[: position.stage])
        bar = progress_bar(
            sampler.steps * sampler.batch_size,
            position.batch * sampler.batch_size,
            f"{stage.name} {position.epoch + 1}/{stage.epochs}",
            self.config.progress and self.group.is_main,
        )
        with bar:
            start = time.perf_counter()
            trainer.start_epoch(epoch, position.batch)
            while position.batch < sampler.steps:
                every = self.config.checkpoint_steps
                is_last = position.batch + 1 == sampler.steps
                saves = every is not None and (position.step + 1) % every == 0 and not is_last
                is_checked = is_last or saves or (position.step + 1) % check_every == 0
                if losses := self._train_step(trainer, is_checked):
                    bar.set_postfix({k: f"{v:.4f}" for k, v in losses.items()}, refresh=False)
                now = time.perf_counter()
                position.epoch_seconds += now - start
                start = now
                bar.update(sampler.batch_size)
                if saves:
                    self._save(trainer)
                    start = time.perf_counter()

    def _train_step(self, trainer: Trainer, is_checked: bool) -> dict[str, float]:
        """Returns the losses where they are looked at."""
        position = self.position
        # Dropout, drop-path and mixup are functions of (seed, process, step): a resumed run repeats them.
        seed_all(self.config.seed, self.group.rank, position.step)
        step = position.batch + position.epoch * trainer.sampler.steps  # of this stage
        self.losses.add(trainer.gradients(step), trainer.sampler.share, position.step)
        losses = self._checked_losses(trainer) if is_checked else {}
        trainer.update()
        position.batch += 1
        position.step += 1
        return losses

    def _checked_losses(self, trainer: Trainer) -> dict[str, float]:
        """The losses of this step; all processes stop if those of one of them were not finite since the last
        time."""
        found = self.losses.not_finite()
        if found is None:
            return self.losses.last()
        step, losses = found
        values = ", ".join(f"{name} {value}" for name, value in losses.items())
        raise TrainingError(
            f"the loss is not finite ({values}) in stage {trainer.stage.name}, epoch "
            f"{self.position.epoch + 1}, step {step}, at learning rate"
            f" {trainer.learning_rate:.3g}; the weights before this step are untouched in the "
            "last checkpoint. Try a lower --lr, --clip-grad 1, longer --warmup-epochs, or --amp bfloat16 or "
            "none in place of float16"
        )

    def _end_epoch(self, trainer: Trainer) -> None:
        """Evaluates, writes the epoch's row, and a checkpoint where one is due."""
        position, stage, sampler = self.position, trainer.stage, trainer.sampler
        images = sampler.steps * sampler.batch_size
        is_last = position.epoch + 1 == stage.epochs
        judged = is_last or (position.epoch + 1) % self.config.eval_every == 0
        row = {
            "stage": stage.name,
            "epoch": position.epoch,
            "step": position.step,
            "lr": trainer.learning_rate,
            **self.losses.means(),
            **(self._evaluate(trainer) if judged else {}),
            "seconds": round(position.epoch_seconds, 3),
            "images_per_second": round(images / max(position.epoch_seconds, 1e-9), 1),
        }
        position.seconds += position.epoch_seconds
        position.epoch, position.batch, position.epoch_seconds = position.epoch + 1, 0, 0.0
        self.losses = RunningLosses(self.group)
        self.rows.append(row)
        metric, candidates = self.config.best_metric, self._rows_to_choose_from(stage)
        if metric and judged and candidates and best_row(candidates, metric) is row:
            weights = trainer.evaluated_model.state_dict()
            self.best = {name: value.detach().cpu().clone() for name, value in weights.items()}
        if self.records is not None:
            self.records.write(self.rows)
            left = sum(s.epochs for s in self.stages[position.stage :]) - position.epoch
            if self.config.progress:
                print(epoch_line(row, stage.epochs, left * row["seconds"]), flush=True)
        if is_last or position.epoch % self.config.checkpoint_epochs == 0:
            self._save(trainer)

    # Evaluation

    def _evaluate(self, trainer: Trainer) -> dict[str, Any]:
        model = trainer.evaluated_model
        val = self.val_outputs = self.judge.outputs(model, self.data.val)
        values: dict[str, Any] = {}
        if trainer.stage.mode != "contrast":
            values |= val.classification(len(self.data.classes))
        if self.config.eval_embeddings == "epoch":
            values |= judge.accuracies(self.judge.frozen(model, self.data.train, val, probe=False))
        return values

    def _finish(self) -> dict[str, Any]:
        config = self.config
        if self.best is not None:
            if self.group.is_main:
                self._write_backbone("last.safetensors")
            self.model.load_state_dict(self.best)
            self.val_outputs = None
        val = self.val_outputs or self.judge.outputs(self.model, self.data.val)
        results: dict[str, Any] = {
            "objective": config.objective,
            "model": config.model,
            "data": config.data,
            "seed": config.seed,
            **versions(),
            "classes": len(self.data.classes),
            "train_images": len(self.data.train),
            "split": self.data.watched,
            "images": len(self.data.val),
            "epochs": len(self.rows),
            "steps": self.position.step,
            "seconds": round(self.position.seconds, 3),
            "seconds_per_epoch": round(self.position.seconds / max(1, len(self.rows)), 4),
            **val.classification(len(self.data.classes), self.data.watched),
        }
        if config.best_metric and self.rows:  # --epochs 0 leaves nothing to choose from
            best = best_row(self._rows_to_choose_from(self.stages[-1]), config.best_metric)
            results |= {"best_metric": config.best_metric, "best_epoch": self.rows.index(best) + 1}
        part, found = None, {}
        if config.eval_embeddings != "never":
            part = self.judge.part(val)
            found = self._judge_embeddings(val)
            results |= judge.accuracies(found) | judge.quality(part)
        if self.untouched is not None:
            results[UNTOUCHED] = judge.accuracies(self.untouched)
        if self.group.is_main:
            (self.folder / "checksums.json").unlink(missing_ok=True)  # of a run that is finished again
            correct = correct_tensors(self.data.val, {"top1": val.correct(), **found}, self.untouched)
            checkpoint.write_weights(self.folder / "correct.safetensors", correct)
            self._write_results(results, part)
        return results

    def _judge_embeddings(self, val: judge.Outputs) -> dict[str, Tensor]:
        return self.judge.frozen(self.model, self.data.train, val)

    def _write_results(self, results: dict[str, Any], val: judge.Outputs | None) -> None:
        self._write_backbone("model.safetensors")
        if val is not None:
            tensors = {"embeddings": val.embeddings, "labels": val.labels}
            checkpoint.write_weights(self.folder / "embeddings.safetensors", tensors)
        checkpoint.write_text(self.folder / "results.json", json.dumps(results, indent=2) + "\n")
        report.write_run_report(
            self.folder, self.config, results, self.rows, self.data.classes, val, self.data.val, self.with_map
        )
        write_finished(self.folder, self.config)  # last: a run killed before it is finished again
        if self.config.progress:
            shown = {k: v for k, v in results.items() if k in ("top1", "top5", "knn", "centroid", "probe")}
            figures = "  ".join(f"{k} {100 * v:.2f} %" for k, v in shown.items())
            print(f"{figures}\nreport: {self.folder / 'report.html'}")

    def _write_backbone(self, name: str) -> None:
        metadata = {
            "model": self.config.model,
            "classes": json.dumps(self.data.classes),
            "input": json.dumps(self.input),
            "arguments": json.dumps(self.model.arguments),
            "global_pool": self.config.global_pool or "",
            "format": "pt",
        }
        checkpoint.write_weights(self.folder / name, self.model.backbone.state_dict(), metadata)

    # Checkpoints

    def _save(self, trainer: Trainer) -> None:
        sums, state = self.group.gather(self.losses.sums()), trainer.state()
        if not self.group.is_main:
            return
        training = {
            "position": dataclasses.asdict(self.position),
            **state,
            "sums": sums,
            "rows": self.rows,
            "untouched": self.untouched,
            "best": self.best,
            "world_size": self.group.world_size,
            "data": self.digest,
        }
        checkpoint.save_checkpoint(
            self.folder,
            self.position.step,
            self.model.state_dict(),
            training,
            self.config.keep_checkpoints,
            run_id(self.config),
        )

    def _restore(self, folder: Path) -> None:
        weights, training = checkpoint.load_checkpoint(folder)
        if training["world_size"] != self.group.world_size:
            raise TrainingError(
                f"{folder}: written by {training['world_size']} process(es); resume with as many, not "
                f"{self.group.world_size}: the batches would differ"
            )
        if difference := digest_differences(training.get("data", {}), self.digest):
            raise TrainingError(
                f"--resume: {folder} was trained on other data than is there now: {difference}"
            )
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise TrainingError(
                f"{folder}: not a checkpoint of this model: {str(error).splitlines()[1].strip()}"
            ) from error
        self.position = Position(**training["position"])
        self.losses = RunningLosses(self.group, training["sums"][self.group.rank])
        self.rows = training["rows"]
        self.untouched, self.best = training.get("untouched"), training.get("best")
        self.trainer_state = training
        if self.group.is_main and self.config.progress:
            print(f"resuming from {folder}")
