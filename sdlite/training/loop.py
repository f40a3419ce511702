"""The one training loop: any task, any number of processes, to the end of a time budget, exactly resumable.

    sample numbers n, n+1, ... --order--> indices --task--> loss --optimizer, EMA--> weights --> OUT/state-<samples>/

Progress is counted in samples. Order, augmentation and noise are derived from the seed and the number of the sample;
learning rates are derived from the samples seen. So a run that was stopped and resumed has the same weights as one that
was not, and P processes with batch B compute what one process computes with batch P B.

The first Ctrl-C or SIGTERM ends a run after the current step: it is saved and exported, and can be resumed as if it had
not been stopped. run.py describes the files in OUT.
"""

import math
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]

from sdlite.training import run
from sdlite.training.keeper import Keeper, say
from sdlite.training.options import Stage, TrainConfig as TrainConfig, options_of
from sdlite.training.state import State as State, Task as Task, ema_decay, load_average as load_average, update_ema
from sdlite.training.stop import Stop

TORCHRUN_SECONDS = 2.0  # in which torchrun passes a signal on to processes that have it from the terminal already


def order(size: int, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Item of each sample number; every epoch has a new permutation. (B,) -> (B,) int64."""
    epochs = numbers // size
    shuffled = {int(e): np.random.default_rng((seed, int(e))).permutation(size) for e in np.unique(epochs)}
    return np.array([shuffled[int(e)][n % size] for e, n in zip(epochs, numbers, strict=True)], np.int64)


def learning_rate(samples_seen: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant, or half a cosine down to zero at config.samples."""
    rate = config.lr * min(1.0, (samples_seen + 1) / max(config.warmup, 1))
    if config.decay == "cosine":
        assert config.samples is not None, "TrainConfig refuses cosine without samples"
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, samples_seen / config.samples)))
    return rate


def train(stage: Stage, data: Path, out: Path, **fields: Any) -> None:
    """Trains a stage into `out`; continues the run if `out` holds one.

    fields: those of the stage's record in options.py; None stands for the default. The module of the stage makes its
    task. Raises ValueError or FileNotFoundError that says what is missing.
    """
    options = options_of(stage, fields)
    fit(import_module(f"sdlite.training.{stage}").make_task(data, out, options), options, out)


def fit(task: Task, config: TrainConfig, out: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
    """Trains task until config.samples or config.minutes are over, from the last sound checkpoint in `out`, if any.

    Writes a checkpoint, and the task's export of the averaged weights to out/export. Raises ValueError if out holds a
    run of something else, FloatingPointError for a loss or weights that are not finite, and KeyboardInterrupt if it was
    interrupted and has saved and exported.
    """
    if config.samples is None and config.minutes is None:
        raise ValueError("give minutes or samples, or training would never end")
    with Stop("stopping: what is learned so far is saved and exported") as stop:
        Trainer(task, config, stop, clock).run(out)
        if stop.asked:
            raise KeyboardInterrupt


class Trainer:
    """Trains a task, alone or as one of several processes. The main one also keeps the run's folder."""

    def __init__(self, task: Task, config: TrainConfig, stop: Stop, clock: Callable[[], float]) -> None:
        assert isinstance(task, Task), "make it a subclass of sdlite.training.state.Task"
        self.config, self.stop, self.clock = config, stop, clock
        self.accelerator = accelerator = Accelerator(mixed_precision=config.precision)
        stop.once = TORCHRUN_SECONDS if accelerator.num_processes > 1 else 0
        self.task = task.to(accelerator.device)
        self.state = State(task, config, accelerator.scaler)
        self.wrapped, self.optimizer = accelerator.prepare(task, self.state.optimizer)

    def run(self, out: Path) -> None:
        """Begins the run in `out`, or continues it, and trains until it is over."""
        accelerator = self.accelerator
        changes = run.changes(out, self.state.settings(self.config), new_data=self.config.new_data)
        notes = [*self.task.notes, *self.state.resume(out)]
        with self.stop.idle():
            self.task.prepare(say if accelerator.is_main_process else lambda text: None)
        keeper = None
        begun = self.clock()
        if accelerator.is_main_process:
            keeper = Keeper(self.task, self.state, self.config, out, self.stop, self.clock)
            keeper.begin(notes, changes)
        try:
            self._train(out, begun, keeper)
        finally:
            if keeper is not None:
                keeper.bar.stop()
        accelerator.wait_for_everyone()

    def _train(self, out: Path, begun: float, keeper: Keeper | None) -> None:
        self.task.train()
        while not self._is_over(begun):
            loss = self._step(out)
            if keeper is not None:
                keeper.step(loss)
        if keeper is not None:
            keeper.finish()

    def _step(self, out: Path) -> float:
        """Trains on one batch of every process. Returns the mean loss."""
        config, state, accelerator = self.config, self.state, self.accelerator
        numbers = np.arange(config.batch_size) + state.samples + accelerator.process_index * config.batch_size
        indices = order(self.task.size, config.seed, numbers)
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("share", 1.0) * learning_rate(state.samples, config)
        with accelerator.autocast():
            loss = self.wrapped(torch.from_numpy(indices), torch.from_numpy(numbers))
        if not math.isfinite(value := accelerator.reduce(loss.detach(), "mean").item()):
            last = next((path.name for path in reversed(run.checkpoints(out))), "none")
            where = f"after {state.samples} samples, items {indices.tolist()}; last checkpoint: {last}"
            raise FloatingPointError(f"loss is {value} {where}; try a lower --lr")
        self.optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(state.parameters, config.clip)
        self.optimizer.step()
        batch = config.batch_size * accelerator.num_processes
        state.samples += batch
        update_ema(state.average, state.module.state_dict(), ema_decay(state.samples, batch, config.half_life))
        return value

    def _is_over(self, begun: float) -> bool:
        """Whether the budget is spent (by the main process's clock) or a process was asked to stop."""
        config, accelerator = self.config, self.accelerator
        seconds = self.clock() - begun
        if config.samples is not None and self.state.samples >= config.samples:
            return True
        late = config.minutes is not None and seconds > 60 * config.minutes and accelerator.is_main_process
        if accelerator.num_processes == 1:
            return late or self.stop.asked
        votes = torch.tensor(float(late or self.stop.asked), device=accelerator.device)
        return bool(accelerator.reduce(votes, "sum").item() > 0)
