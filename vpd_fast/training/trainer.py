"""The training loop: steps, evaluation, checkpoints, and an orderly end whatever happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpd_fast.checkpoints.save import pretrained_writers
from vpd_fast.data import TrainLoader, make_transform
from vpd_fast.data.sample import notes_of
from vpd_fast.errors import CheckpointError, InputError, TrainingError, VPDFastError, described
from vpd_fast.evaluation.distributed import gather
from vpd_fast.models import VPD
from vpd_fast.tasks import TASKS
from vpd_fast.training import build, checkpoint, parallel
from vpd_fast.training.config import TrainConfig
from vpd_fast.training.logging import RunLog, Window, sample_pictures
from vpd_fast.training.parallel import Processes, batch_norm_buffers
from vpd_fast.training.run_folder import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    check_same,
    open_folder,
    require_there,
    resume_from,
    save_best,
)
from vpd_fast.training.stopping import StopSignals
from vpd_fast.training.tasks import Encode, Sentences, Task, TrainStep


@dataclass(frozen=True)
class Summary:
    """The end of a run. best: the folder for `VPD.from_pretrained`, None without evaluation; metric: (name, value)."""

    step: int
    steps: int
    stopped: bool
    last: Path | None
    best: Path | None
    metric: tuple[str, float] | None
    skipped_steps: int


class Trainer:
    """One run in `folder`: `Trainer(config, folder).run()`.

    resume: "never" wants an empty folder, "auto" goes on from the folder's last checkpoint (and begins if it has none),
    a path from that checkpoint. sentences: sentences -> token features (S,tokens,context_dim), in place of CLIP.
    folder None: nothing is written, as for a dry run.

    A resumed run gives bit for bit what an unbroken one would, on GPUs as far as PyTorch's operators are deterministic
    there. Raises InputError where configuration, folder and checkpoint do not fit, DatasetError, CheckpointError.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: str | Path | None,
        *,
        resume: str | Path = "never",
        sentences: Sentences | None = None,
        bar: bool | None = None,
    ) -> None:
        config.check_complete()
        self.config = config
        self._folder = None if folder is None else Path(folder)
        self.processes = Processes(config.device == "cpu", find_unused=bool(config.model.get("train_encoder")))
        self._resume = resume
        self.resumed_from = resume_from(self._folder, self._folder and self.store, resume)
        state = None
        if self.resumed_from is not None:
            state = checkpoint.read_state(self.resumed_from)
            check_same(TrainConfig.from_dict(state["config"]), config, self.resumed_from)

        self.train_data, self.val_data = build.open_datasets(config)
        self.notes: list[str] = []
        self.model = self._build_model()
        for what, dataset in (("training data", self.train_data), ("evaluation data", self.val_data)):
            self.notes += [f"{what}: {note}" for note in ([] if dataset is None else notes_of(dataset))]
        self.loader = self._build_loader()
        epochs = (config.schedule.epochs or 0) * self.loader.epoch_length  # in passes
        self.steps = config.schedule.steps or max(epochs // config.accumulation, 1)
        if sentences is None and TASKS[config.task].takes_text:
            sentences = build.sentence_features(config, self.model)
        self.sentences = sentences
        self.encode = self._build_encoder()
        self.task = Task(self.model, config.quirks, self.sentences)
        self.precision = build.choose_precision(config.precision, self.processes.device)
        dtype = torch.bfloat16 if self.precision == "bf16" else None
        self.train_step = self.processes.wrap(TrainStep(self.model, self.task, dtype), config.distributed.fsdp)
        self.optimizer, self.schedule = build.build_optimizer(config, self.model, self.steps)

        self.step = 0
        self.best: dict[str, Any] | None = None
        self.evaluated = 0
        self.nan_in_row = 0
        self.skipped_steps = 0
        self.bar = bar
        self.window = Window()
        self._written: set[Path] = set()  # what is in the folder at the end, if nobody removes it
        self.signals = StopSignals()
        torch.manual_seed(config.seed + self.processes.rank)
        if state is not None:
            self._load(state)

    @property
    def folder(self) -> Path:
        """The folder of the run. A dry run has none, and reaches nothing that writes."""
        assert self._folder is not None
        return self._folder

    @property
    def store(self) -> checkpoint.CheckpointStore:
        """The checkpoints of the run."""
        return checkpoint.CheckpointStore(self.folder / CHECKPOINTS, self.config.checkpoints.keep)

    # Building

    def _build_model(self) -> VPD:
        config = self.config
        if self.resumed_from is not None:
            model = VPD.from_pretrained(self.resumed_from, task=config.task)
        else:
            model, self.notes = build.build_model(config, self.train_data.class_names)
        model.attention_backend = config.attention_backend
        if config.checkpointing is not False:
            model.gradient_checkpointing_enable(config.checkpointing)
        if self.processes.count > 1 and config.distributed.sync_bn:
            if self.processes.device.type == "cuda":
                nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place, as the model itself is no batch norm
            else:
                self.notes.append("PyTorch has no SyncBatchNorm on CPUs: each process normalises by its own images")
        return build.own_memory(model.to(self.processes.device)).train()

    def _build_loader(self) -> Any:
        config, data = self.config, self.config.data
        loader = TrainLoader(
            self.train_data, make_transform(config.task, train=True, size=data.size, **data.transform),
            batch_size=config.batch_size, workers=data.workers, seed=config.seed, rank=self.processes.rank,
            world_size=self.processes.count, on_error=data.on_error, max_failures=data.max_failures,
        )  # fmt: skip
        if loader.epoch_length < 1:
            raise InputError(
                f"{data.root}: {len(self.train_data)} samples do not make one batch of {config.batch_size} for each of "
                f"{self.processes.count} processes; set a smaller batch_size"
            )
        return loader

    def _build_encoder(self) -> Encode:
        if self.model.config.train_encoder:
            return self.model.encode
        if self.config.encoder.cache is not None and TASKS[self.config.task].augmented:
            self.notes.append("encoder.cache is not used: images are augmented at random, so none comes twice")
        return build.latent_encoder(self.config, self.model)

    # The loop

    def run(self) -> Summary:
        """Train to the end, or until a signal stops it; then the run is saved and `stopped` is true.

        Raises TrainingError when steps are not finite again and again, or one fails, on its GPU for example;
        CheckpointError when a checkpoint cannot be written, DatasetError when too many samples cannot be read (the
        steps until then are saved), InputError when another run writes into the folder.
        """
        self.processes.wait()  # all have looked into the folder before anything in it changes
        with contextlib.ExitStack() as stack:
            with self.processes.first_only():
                if self.processes.first:
                    stack.enter_context(
                        open_folder(self.folder, self.store, self.config, self._resume, self.resumed_from)
                    )
                    self._written.add(self.folder / CONFIG)
            self._run_locked()
            with self.processes.first_only():
                require_there(self._written)
        return self._summary()

    def _run_locked(self) -> None:
        log = RunLog(
            self.folder if self.processes.first else None, start=self.step, steps=self.steps,
            evaluated=self.evaluated,
            tensorboard=self.config.log.tensorboard, bar=self.bar,
        )  # fmt: skip
        with self.signals, contextlib.closing(log) as self.log:
            for note in self.notes:
                self.log.message(f"note: {note}")
            with contextlib.suppress(KeyboardInterrupt) if self.processes.count == 1 else contextlib.nullcontext():
                try:
                    self._loop()
                except (VPDFastError, OSError):
                    raise
                except Exception as error:
                    last = self.store.last()
                    rest = "there is no checkpoint yet" if last is None else f"--resume auto goes on from {last}"
                    raise TrainingError(f"step {self.step + 1} failed ({described(error)}); {rest}") from error

    def _loop(self) -> None:
        if self.step and self._evaluation_due(self.step) and self.evaluated < self.step:
            self._evaluate()  # the run was stopped before or while evaluating
        batches = self.loader.batches(self.step * self.config.accumulation)
        self.window.restart()
        saved = time.monotonic()
        random = checkpoint.random_state()
        ahead = self._fetch(batches)
        checkpoint.set_random_state(random)  # starting a DataLoader draws a number, wherever the run begins
        while self.step < self.steps:
            if isinstance(ahead, VPDFastError):
                # The steps so far are whole. Where there are several processes the others know nothing of the error.
                if self.step and self.processes.count == 1:
                    self._save()
                raise ahead
            minutes = self.config.checkpoints.every_minutes
            due = minutes is not None and time.monotonic() - saved >= 60 * minutes
            loss, finite, stop, due, ahead = self._one_step(ahead, batches, due)
            self.window.add(loss, finite, self.config.batch_size * self.config.accumulation * self.processes.count)
            self.log.advance(self.step, loss, self.rate())
            if finite:
                self.nan_in_row = 0
            else:
                self._count_nan(loss)
            if self.step % self.config.log.every == 0 or self.step == self.steps:
                self.log.scalars(self.step, **self.window.values(), lr=self.rate(), skipped=len(self.loader.skipped))
                self.window = Window()
            every = self.config.checkpoints.every_steps
            evaluate = self._evaluation_due(self.step)
            if stop or due or evaluate or self.step == self.steps or (every and self.step % every == 0):
                self._save()
                saved = time.monotonic()
            if stop:
                self.signals.asked = True
                return
            if evaluate:
                self._evaluate()

    def _fetch(self, batches: Iterator[dict[str, Any]]) -> dict[str, Tensor] | VPDFastError:
        """Return the inputs of the next pass, or the error that came instead, to be raised once this step is whole."""
        try:
            batch = next(batches)
        except VPDFastError as error:
            return error
        for message in batch.get("skipped", ()):
            self.log.message(f"skipped: {message}")
        return self.task.prepare(batch, self.encode, self.processes.device)

    def _one_step(
        self, inputs: dict[str, Tensor], batches: Iterator[dict[str, Any]], due: bool
    ) -> tuple[float, bool, bool, bool, dict[str, Tensor] | VPDFastError]:
        """Return the loss, whether all were finite, whether to stop, whether to save, and the next inputs."""
        count = self.config.accumulation
        before = [buffer.clone() for buffer in batch_norm_buffers(self.model)]
        total = torch.zeros((), device=self.processes.device)
        ahead: dict[str, Tensor] | VPDFastError = inputs
        for i in range(count):
            if isinstance(ahead, VPDFastError):
                raise ahead
            with self.processes.no_sync(self.train_step, skip=i + 1 < count):
                loss = self.train_step(ahead) / count
                loss.backward()
            total += loss.detach()
            # Encoded while the GPU still works on this step: what follows waits for its numbers.
            ahead = self._fetch(batches) if self.step + 1 < self.steps or i + 1 < count else {}
        norm = self._gradient_norm()
        finite = torch.isfinite(total) & torch.isfinite(norm)
        flags = torch.tensor([self.signals.asked, due and self.processes.first], device=total.device)
        numbers = self.processes.sum(torch.cat([torch.stack([total, finite.float()]), flags.float()])).tolist()
        all_finite = numbers[1] == self.processes.count
        if all_finite:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.schedule(self.step)
            self.optimizer.step()
        else:  # the statistics of batch norm have seen the bad numbers, too
            torch._foreach_copy_(batch_norm_buffers(self.model), before) if before else None  # pyright: ignore[reportPrivateImportUsage]
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return numbers[0] / self.processes.count, all_finite, numbers[2] > 0, numbers[3] > 0, ahead

    def _gradient_norm(self) -> Tensor:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = parallel.whole(torch.nn.utils.get_total_norm(gradients))
        clip = self.config.optimizer.clip
        if clip is not None:
            factor = (clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor.item() if self.processes.sharded else factor)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def rate(self) -> float:
        """Return the largest learning rate of the groups, as last set."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _count_nan(self, loss: float) -> None:
        self.skipped_steps += 1
        self.nan_in_row += 1
        self.log.message(f"step {self.step}: loss {loss:.4g} or its gradient is not finite, the step is skipped")
        if self.nan_in_row > self.config.max_nan_steps:
            last = self.store.last()
            raise TrainingError(
                f"step {self.step}: {self.nan_in_row} steps in a row without a finite loss and gradient, more than "
                f"max_nan_steps={self.config.max_nan_steps}; the last checkpoint is {last or 'none'}"
            )

    def try_batch(self) -> float:
        """Return the loss of one batch, after forward and backward. Weights stay as they are."""
        inputs = self.task.prepare(next(self.loader.batches(0)), self.encode, self.processes.device)
        loss = self.train_step(inputs)
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        return self.processes.sum(loss.detach()).item() / self.processes.count

    # Evaluation

    def _evaluation_due(self, step: int) -> bool:
        if self.val_data is None:
            return False
        every = self.config.evaluation
        if step == self.steps or (every.every_steps and step % every.every_steps == 0):
            return True
        if every.every_epochs:
            length = every.every_epochs * self.loader.epoch_length
            passes = self.config.accumulation
            return step * passes // length > (step - 1) * passes // length
        return False

    def _evaluate(self) -> None:
        from vpd_fast.evaluation import evaluate

        assert self.val_data is not None
        options = self.config.evaluation
        random = checkpoint.random_state()
        self.processes.share_buffers(self.model)
        model = parallel.whole_model(self.model)
        self.signals.breakable = self.processes.count == 1
        try:
            if self.signals.breakable and self.signals.asked:
                raise KeyboardInterrupt
            result = evaluate(
                model, self.val_data, limit=options.limit, batch_size=options.batch_size,
                rank=self.processes.rank, world_size=self.processes.count, text_encoder=self.sentences,
                **options.options,
            )  # fmt: skip
            pictures = []
            if self.processes.first and self.config.log.tensorboard:
                pictures = sample_pictures(
                    model, self.val_data, self.config.log.pictures, self.sentences, options.options
                )
        except KeyboardInterrupt:
            self.signals.asked = True
            raise
        finally:
            self.signals.breakable = False
            self.model.train()
            checkpoint.set_random_state(random)
        task = TASKS[self.config.task]
        name, value = task.metric, result.metrics[task.metric]
        better = value == value and (self.best is None or task.is_better(value, self.best["value"]))
        if better:
            self.best = {"step": self.step, "metric": name, "value": value}
        self.evaluated = self.step
        self.log.evaluation(self.step, result.metrics, better)  # before it counts: a kill in between evaluates anew
        with self.processes.first_only():
            if self.processes.first:
                if better:
                    save_best(self.folder, model, {"step": self.step, **result.metrics})
                    self._written.add(self.folder / BEST)
                self.store.write_index(best=self.best, evaluated=self.evaluated)
        self.log.pictures(self.step, pictures)

    # Saving and resuming

    def _save(self) -> None:
        self.processes.share_buffers(self.model)
        states = gather(checkpoint.random_state(), self.processes.count)
        weights = parallel.whole(self.model.state_dict())
        optimizer = parallel.optimizer_state(self.optimizer)
        with self.processes.first_only():
            if self.processes.first:
                writers = pretrained_writers(Path(), self.model.config, weights)
                path = self.store.save(
                    self.step,
                    {
                        **{path.name: write for path, write in writers.items()},
                        CONFIG: self.config.save,
                        checkpoint.STATE: lambda path: checkpoint.write_state(path, self._state(optimizer, states)),
                    },
                )
                self.store.write_index()
                self._written = {w for w in self._written if w.parent != path.parent} | {path}

    def _state(self, optimizer: dict[str, Any], random_states: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "format": 1,
            "step": self.step,
            "batches": self.step * self.config.accumulation,
            "config": self.config.to_dict(),
            "run": self._facts(),
            "optimizer": optimizer,
            "random": random_states,
            "best": self.best,
            "evaluated": self.evaluated,
            "nan_in_row": self.nan_in_row,
            "skipped_steps": self.skipped_steps,
            "window": self.window.losses,
        }

    def _facts(self) -> dict[str, int]:
        """Return what decides which samples a step gets, besides the configuration."""
        return {"processes": self.processes.count, "samples": len(self.train_data), "steps": self.steps}

    def _load(self, state: dict[str, Any]) -> None:
        changed = [
            f"{name} is {value}, was {state['run'].get(name)}"
            for name, value in self._facts().items()
            if state["run"].get(name) != value
        ]
        if changed:
            raise InputError(f"{self.resumed_from}: cannot be continued bit for bit, {'; '.join(changed)}")
        try:
            parallel.load_optimizer_state(self.optimizer, state["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{self.resumed_from}: its optimizer state does not fit ({error})") from error
        checkpoint.set_random_state(state["random"][self.processes.rank])
        self.step = state["step"]
        self.nan_in_row, self.skipped_steps = state["nan_in_row"], state["skipped_steps"]
        self.best, self.evaluated = state["best"], state["evaluated"]
        self.window.losses = list(state.get("window", ()))
        here = self._folder is not None and self.store.folder.resolve()
        if self.resumed_from is not None and self.resumed_from.parent.resolve() == here:
            # An evaluation after the checkpoint: its result is worth as much as before.
            index = self.store.read_index()
            self.best = index.get("best") or self.best
            if index.get("evaluated") == self.step:
                self.evaluated = self.step

    def _summary(self) -> Summary:
        best = self.folder / BEST
        return Summary(
            step=self.step,
            steps=self.steps,
            stopped=self.signals.asked,
            last=self.store.last(),
            best=best if self.best is not None and best.is_dir() else None,
            metric=None if self.best is None else (self.best["metric"], self.best["value"]),
            skipped_steps=self.skipped_steps,
        )
