"""The training loop, on Hugging Face accelerate: one process, or several under ``torchrun`` or ``accelerate launch``."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gresbox.structures import Recipe
from gresbox.training.aml import AlignmentMaskedTraining
from gresbox.training.batches import TrainingBatch, TrainingCollate, make_loader
from gresbox.training.capture import CapturedStep, capture_step
from gresbox.training.checkpoint import Checkpoints, TrainState
from gresbox.training.evaluation import COUNTS, evaluate
from gresbox.training.optimizers import make_optimizer
from gresbox.training.options import TrainOptions
from gresbox.training.order import StepOrder
from gresbox.training.processes import gather_objects, same_everywhere, start_accelerator
from gresbox.training.randomness import get_random_state, seed_random, set_random_state
from gresbox.training.records import RunLog
from gresbox.training.results import check_folder, save_pictures, save_results, write_json
from gresbox.training.schedule import learning_rate_factor, set_learning_rates

__all__ = ["Trainer", "train"]


def train(
    model: nn.Module,
    train_set: Any,
    val_set: Any,
    out: str | Path,
    options: TrainOptions | None = None,
    *,
    criterion: nn.Module | None = None,
    resume: bool = False,
    aml: AlignmentMaskedTraining | None = None,
) -> dict[str, float]:
    """Train a model with its recipe, evaluate it and leave everything in a folder.

    The folder gets ``run.json`` (recipe and options), ``checkpoints/`` and ``log.jsonl`` on the way, and at the end what
    ``model.save_pretrained`` writes, ``metrics.json`` and, where matplotlib is installed, ``loss_curve.png`` and ``pictures.png``.

    Two processes, or two accumulation steps, train exactly as one with the whole batch does: the samples of a step are the same,
    and losses per instance are divided by the instances of the whole step. A run that was killed continues, on the CPU bit for
    bit, from its last checkpoint.

    Args:
        model: Any model of the library; trained in place.
        train_set: Has a length and gives a :class:`gresbox.structures.GresSample` per index.
        val_set: The same, for the evaluation; None: no evaluation.
        out: The run's folder.
        options: How long, how and where.
        criterion: Output and targets to losses; default: ``model.criterion()``.
        resume: Continue the run in ``out``; starts from the beginning where there is no checkpoint yet.
        aml: A wrapper around ``model`` that is called in its place while training; the model itself is evaluated and saved.

    Returns:
        What :func:`gresbox.training.evaluate` gives, and ``steps`` and ``seconds`` of training.

    Raises:
        ValueError: If an option is out of range, ``out`` holds a run and ``resume`` is False, or the run in ``out`` is another.
        RuntimeError: If the loss is no longer finite, or the model has no tokenizer.
        ImportError: If accelerate is not installed.
    """
    trainer = Trainer(model, train_set, val_set, Path(out), options or TrainOptions(), criterion=criterion, aml=aml)
    return trainer.run(resume=resume)


class Trainer:
    """One training run; :func:`train` is the way in.

    Args:
        model: Trained in place.
        train_set: Samples to train on.
        val_set: Samples to score; None: no evaluation.
        out: The run's folder.
        options: How long, how and where.
        criterion: Default: the model's.
        aml: A wrapper around ``model`` that is called in its place while training.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: Any,
        val_set: Any,
        out: Path,
        options: TrainOptions,
        *,
        criterion: nn.Module | None = None,
        aml: AlignmentMaskedTraining | None = None,
    ) -> None:
        if aml is not None:
            _check_wrapper(model, aml)
        self.aml = aml
        self.plain, self.train_set, self.val_set, self.out, self.options = model, train_set, val_set, out, options
        self.recipe: Recipe = options.applied_to(model.recipe)  # type: ignore[arg-type]
        self.accelerator = start_accelerator(self.recipe.amp, cpu=options.cpu)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.total_steps = options.total_steps(self.recipe, len(train_set))
        self.order = StepOrder(
            len(train_set),
            self.recipe.batch,
            self.total_steps,
            accumulate=options.accumulate,
            rank=self.rank,
            world=self.world,
            seed=options.seed,
        )
        self.criterion: Any = (model.criterion() if criterion is None else criterion).to(self.device)  # type: ignore[operator]
        self.counts_instances = "num_instances" in inspect.signature(self.criterion.forward).parameters
        self.captured = self._captured()
        self.checkpoints = Checkpoints(out / "checkpoints", options.keep_checkpoints)
        self.identity = {"seed": options.seed, "batch": self.recipe.batch, "train_samples": len(train_set)}
        self.settings = self.identity | _settings(model, self.recipe, train_set)
        self.settings["aml"] = None if aml is None else aml.settings()
        self.step, self.seconds = 0, 0.0

    def run(self, *, resume: bool = False) -> dict[str, float]:
        """Train, evaluate, save; returns the scores."""
        TrainingCollate(self.plain.processor)([self.train_set[0]])  # a clear error now, not one from inside a worker
        check_folder(self.out, self.checkpoints, resume=resume)
        seed_random(self.options.seed * 1_000_003 + self.rank)  # each process its own stream, all from one seed
        groups = self.plain.parameter_groups(self.recipe.lr)  # type: ignore[operator]
        self.plain.to(self.device)
        self.optimizer = make_optimizer(self.recipe, groups)
        if resume and self.checkpoints.steps():
            self._restore(self.checkpoints.load(self.plain, self.checkpoints.steps()[-1]))
        stepped = (self.plain if self.aml is None else self.aml.to(self.device)).train()
        self.wrapped, self.prepared = self.accelerator.prepare(stepped, self.optimizer)
        if self.rank == 0:
            described = {"recipe": asdict(self.recipe), "options": asdict(self.options)}
            write_json(self.out / "run.json", described if self.aml is None else {**described, "aml": self.aml.settings()})
        self.log = RunLog(
            self.out,
            start=self.step,
            total=self.total_steps,
            active=self.rank == 0,
            progress=self.options.progress,
            tensorboard=self.options.tensorboard,
        )
        try:
            scores = self._train_and_score()
        finally:
            self.log.close()
        summary = {**scores, "steps": float(self.step), "seconds": self.seconds}
        if self.rank == 0:
            if self.val_set is not None and self.options.pictures > 0:
                save_pictures(self.plain, self.val_set, self.out, self.options)
            save_results(self.plain, self.out, summary, self.identity)
        self.accelerator.wait_for_everyone()
        return summary

    def _train_and_score(self) -> dict[str, float]:
        try:
            if self.options.evaluate_start and self.step == 0:
                self._evaluate()
            self._train()
        finally:
            self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)  # gives the model its own forward back
        return {} if self.val_set is None else self._evaluate()

    def _train(self) -> None:
        options = self.options
        sums: dict[str, Tensor] = {}
        last_checkpoint = started = time.monotonic()
        done_before, steps_before = self.seconds, self.step
        for batches in self._steps():
            sums = self._optimise(batches, sums)
            self.step += 1
            self.log.advance()
            now = time.monotonic()
            self.seconds = done_before + now - started
            at_log = self.step % options.log_every == 0 or self.step == self.total_steps
            late = due = False
            if self.world == 1 or at_log:  # several processes ask the first one's clock, where they wait for each other anyway
                late = options.max_seconds is not None and self.seconds >= options.max_seconds
                due = 0 < options.checkpoint_seconds <= now - last_checkpoint
                late, due = same_everywhere((late, due))
            if at_log or late:
                self._write_log(sums, self.step - steps_before)
                sums, steps_before = {}, self.step
            last = late or self.step == self.total_steps
            if options.evaluate_every and self.step % options.evaluate_every == 0 and not last and self.val_set is not None:
                self._evaluate()
            if due or last or (options.checkpoint_every and self.step % options.checkpoint_every == 0):
                self._save()
                last_checkpoint = time.monotonic()
            started += time.monotonic() - now  # evaluation and checkpoints are not training time
            if last:
                break

    def _steps(self) -> Iterator[list[TrainingBatch]]:
        """The micro-batches of each optimiser step that is still to be done."""
        order = replace(self.order, start=self.step)
        collate = TrainingCollate(self.plain.processor)
        loader = iter(make_loader(self.train_set, order, collate, workers=self.options.workers, seed=self.options.seed))
        for _ in range(self.step, self.total_steps):
            yield [next(loader) for _ in range(self.options.accumulate)]

    def _optimise(self, batches: list[TrainingBatch], sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """One optimiser step; returns the running sums of losses and gradient norm, still on the device."""
        set_learning_rates(self.optimizer, learning_rate_factor(self.recipe, self.step, self.total_steps))
        extra = {"num_instances": self._num_instances(batches)} if self.counts_instances else {}
        for index, batch in enumerate(batches):
            inputs, targets = batch.on(self.device)
            passes = [(1.0, inputs)] if self.aml is None else self.aml.passes(inputs, targets)
            for turn, (weight, arguments) in enumerate(passes, 1):
                with ExitStack() as stack:
                    if turn < len(passes) or index + 1 < len(batches):  # processes add up their gradients once per optimiser step
                        stack.enter_context(self.accelerator.no_sync(self.wrapped))
                    if self.captured is None:
                        losses = self.criterion(self.wrapped(**arguments), targets, **extra)
                    else:
                        losses = self.captured(arguments, targets, **extra)
                    self.accelerator.backward(losses["loss"] * weight / len(batches))
                for name, value in losses.items():
                    _add(sums, name if name == "loss" else f"loss/{name}", value.detach() * weight / len(batches))
            for name, value in ({} if self.aml is None else self.aml.shares).items():
                _add(sums, f"aml/{name}", value / len(batches))
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        limit = self.recipe.clip if self.recipe.clip > 0 else math.inf
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        _add(sums, "grad_norm", norm)
        self.prepared.step()
        self.prepared.zero_grad()
        return sums

    def _captured(self) -> CapturedStep | None:
        """The step whose second half is replayed, where the options ask for it."""
        if not self.options.capture:
            return None
        if self.aml is not None or self.world > 1:
            reason = "without aml" if self.aml is not None else "with one process"
            raise ValueError(f"train: `capture` must be 0 or the training {reason}, got {self.options.capture}.")
        dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.recipe.amp]
        max_tokens: int = self.plain.processor.max_tokens  # type: ignore[union-attr,assignment]
        return capture_step(self.plain, self.criterion, most=self.options.capture, max_tokens=max_tokens, autocast=dtype)

    def _num_instances(self, batches: list[TrainingBatch]) -> float | Tensor:
        """The normaliser of each micro-batch, so that the mean over processes and micro-batches is the whole batch's loss."""
        count = float(sum(sum(batch.counts) for batch in batches))
        parts = self.world * len(batches)
        if self.world == 1:
            return max(count, 1.0) / parts
        total = torch.tensor(count, device=self.device)
        torch.distributed.all_reduce(total)
        return total.clamp(min=1.0) / parts  # a tensor: nobody waits for the device

    def _write_log(self, sums: dict[str, Tensor], steps: int) -> None:
        names = sorted(sums)
        values = torch.stack([sums[name].float() for name in names]) / steps
        if self.world > 1:
            torch.distributed.all_reduce(values)
            values = values / self.world
        numbers = dict(zip(names, values.tolist(), strict=True))
        if not math.isfinite(numbers["loss"]):
            raise RuntimeError(
                f"train: the loss must stay finite, got {numbers['loss']} between steps {self.step - steps} and {self.step}; lower"
                " the learning rate or the clipping norm, then continue from the last checkpoint."
            )
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        epoch = self.step * self.recipe.batch / len(self.train_set)
        self.log.write(self.step, {**numbers, "lr": rate, "epoch": epoch, "seconds": self.seconds})

    def _evaluate(self) -> dict[str, float]:
        scores = evaluate(self.plain, self.val_set, self.options.evaluation)
        self.log.write(self.step, {name: value for name, value in scores.items() if name not in COUNTS}, kind="evaluation")
        return scores

    def _save(self) -> None:
        everyone = gather_objects(get_random_state())
        if self.rank == 0:
            scaler = self.accelerator.scaler
            self.checkpoints.save(
                self.plain,
                TrainState(
                    step=self.step,
                    seconds=self.seconds,
                    optimizer=self.optimizer.state_dict(),
                    random=everyone,
                    run=self.settings,
                    scaler=None if scaler is None else scaler.state_dict(),
                ),
            )

    def _restore(self, state: TrainState) -> None:
        for name, value in self.settings.items():
            if state.run.get(name) != value:
                raise ValueError(f"train: `{name}` must be {state.run.get(name)} to continue the run in {self.out}, got {value}.")
        self.optimizer.load_state_dict(state.optimizer)
        if len(state.random) == self.world:  # with another number of processes the streams cannot be the same
            set_random_state(state.random[self.rank])
        if state.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.step, self.seconds = state.step, state.seconds


def _check_wrapper(model: nn.Module, aml: AlignmentMaskedTraining) -> None:
    if getattr(aml.model, "_orig_mod", aml.model) is not model:  # a compiled model holds the one that it was made of
        raise ValueError("train: `aml` must wrap the model that is trained, got a wrapper around another.")
    if aml.generator is not None:
        raise ValueError("train: `aml` must draw from the global generators, which a checkpoint holds, got one with its own.")


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _settings(model: nn.Module, recipe: Recipe, train_set: Any) -> dict[str, Any]:
    """What a continued run must share with its beginning beside seed, batch and samples; it may be made longer."""
    numbers = {f"recipe.{name}": value for name, value in asdict(recipe).items() if name not in ("batch", "epochs")}
    config = getattr(model, "config", None)
    described = {} if config is None else {name: value for name, value in asdict(config).items() if name != "recipe"}
    return {"train_set": type(train_set).__name__, **numbers, **{f"config.{name}": value for name, value in described.items()}}
