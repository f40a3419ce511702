"""The one training loop: any task, any number of processes, to the end of a time budget, exactly resumable.

    sample numbers n, n+1, ... --order--> indices --task--> loss --AdamW, EMA--> weights --> OUT/state-<samples>/

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
from torch import nn

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
        Process(task, config, out, stop, clock).run()
        if stop.asked:
            raise KeyboardInterrupt


class Process:
    """One of the processes that train together. The main one also keeps the run's folder."""

    def __init__(self, task: Task, config: TrainConfig, out: Path, stop: Stop, clock: Callable[[], float]) -> None:
        assert isinstance(task, nn.Module), "a task is a module, so that its parameters are found"
        self.config, self.out, self.stop, self.clock = config, out, stop, clock
        self.accelerator = accelerator = Accelerator(mixed_precision=config.precision)
        stop.once = TORCHRUN_SECONDS if accelerator.num_processes > 1 else 0
        self.task = task.to(accelerator.device)
        self.state = State(task, config, accelerator.scaler)
        changes = run.changes(out, self.state.settings(config), new_data=config.new_data)
        notes = [*getattr(task, "notes", ()), *self.state.resume(out)]
        with stop.idle():
            getattr(task, "prepare", lambda say: None)(say if accelerator.is_main_process else lambda text: None)
        self.wrapped, self.optimizer = accelerator.prepare(task, self.state.optimizer)
        self.begun = clock()
        self.keeper = Keeper(task, self.state, config, out, stop, clock) if accelerator.is_main_process else None
        if self.keeper is not None:
            self.keeper.begin(notes, changes)

    def run(self) -> None:
        try:
            self.task.train()
            while not self._is_over():
                loss = self._step()
                if self.keeper is not None:
                    self.keeper.step(loss)
            if self.keeper is not None:
                self.keeper.finish()
        finally:
            if self.keeper is not None:
                self.keeper.bar.stop()
        self.accelerator.wait_for_everyone()

    def _step(self) -> float:
        """Trains on one batch of every process. Returns the mean loss."""
        config, state, accelerator = self.config, self.state, self.accelerator
        numbers = np.arange(config.batch_size) + state.samples + accelerator.process_index * config.batch_size
        indices = order(self.task.size, config.seed, numbers)
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("share", 1.0) * learning_rate(state.samples, config)
        with accelerator.autocast():
            loss = self.wrapped(torch.from_numpy(indices), torch.from_numpy(numbers))
        if not math.isfinite(value := accelerator.reduce(loss.detach(), "mean").item()):
            last = next((path.name for path in reversed(run.checkpoints(self.out))), "none")
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

    def _is_over(self) -> bool:
        """Whether the budget is spent (by the main process's clock) or a process was asked to stop."""
        config, accelerator = self.config, self.accelerator
        seconds = self.clock() - self.begun
        if config.samples is not None and self.state.samples >= config.samples:
            return True
        late = config.minutes is not None and seconds > 60 * config.minutes and accelerator.is_main_process
        if accelerator.num_processes == 1:
            return late or self.stop.asked
        votes = torch.tensor(float(late or self.stop.asked), device=accelerator.device)
        return bool(accelerator.reduce(votes, "sum").item() > 0)
