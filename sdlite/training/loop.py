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
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from pydantic import Field, model_validator
from torch import Tensor, nn

from sdlite.config import Record
from sdlite.training import run
from sdlite.training.ema import ema_decay, update_ema
from sdlite.training.keeper import Keeper, say
from sdlite.training.muon import BETAS, Muon
from sdlite.training.stop import Stop

TORCHRUN_SECONDS = 2.0  # in which torchrun passes a signal on to processes that have it from the terminal already


class TrainConfig(Record):
    """How to train. All lengths are in samples. minutes limits this call, samples limits the whole run.

    optimizer: "muon" uses Muon with rate lr for all matrices and kernels except the task's `edges`, and AdamW for the
    rest. decay: "cosine" lets the rate fall to zero at `samples`. precision: for autocast. half_life: of the EMA.
    save_minutes: time between checkpoints. show_minutes: time between exports, each with figures on held-out data and a
    preview. 0 means only at the end, for both. show_samples: samples between exports; 0 means never. plot: draw
    curves.png and progress.html with every export. new_data: continue a run although its data have changed.
    """

    batch_size: int = Field(32, ge=1, le=65_536)
    lr: float = Field(1e-3, gt=0, le=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    warmup: int = Field(3_000, ge=0)
    decay: Literal["constant", "cosine"] = "constant"
    samples: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.01, ge=0, le=1)
    half_life: int = Field(20_000, ge=1)
    clip: float = Field(1.0, gt=0)
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = Field(0, ge=0, lt=2**31)
    report_every: int = Field(2_000, ge=1)
    save_minutes: float = Field(4.0, ge=0)
    show_minutes: float = Field(20.0, ge=0)
    show_samples: int = Field(0, ge=0)
    plot: bool = False
    new_data: bool = False

    @model_validator(mode="after")
    def _ends(self) -> "TrainConfig":
        if self.decay == "cosine" and self.samples is None:
            raise ValueError("decay=cosine needs samples, the length of the whole run, to fall to zero at")
        return self


class Task(Protocol):
    """What to learn: a module that gives the loss of a batch. Training changes its parameters and nothing else.

    It may also have:
    `settings`, a dict of what it was made with; it must be the same when the run is resumed (see `run.changes`);
    `prepare(say)`, slow work that is done after that check;
    `notes`, texts for the user;
    `previews`, the number of images in its preview;
    `begun`, true if it can draw before the first sample: then a preview is shown before training too;
    `edges`, parts of the names of matrices that AdamW trains instead of Muon: first and last layer, embeddings.
    """

    @property
    def size(self) -> int:
        """Number of items in the training data."""

    def __call__(self, indices: Tensor, numbers: Tensor) -> Tensor:
        """Mean loss of items `indices`, (B,) int64; all randomness comes from the sample `numbers`, (B,) int64."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, with the current weights."""

    def preview(self, path: Path) -> None:
        """Writes a PNG that shows what the current weights do."""

    def export(self, folder: Path) -> None:
        """Writes what later stages load into an empty folder."""


def order(size: int, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Item of each sample number; every epoch has a new permutation. (B,) -> (B,) int64."""
    epochs = numbers // size
    shuffled = {int(e): np.random.default_rng((seed, int(e))).permutation(size) for e in np.unique(epochs)}
    return np.array([shuffled[int(e)][n % size] for e, n in zip(epochs, numbers, strict=True)], np.int64)


def learning_rate(samples_seen: int, config: TrainConfig) -> float:
    """Linear warm-up, then constant, or half a cosine down to zero at config.samples."""
    rate = config.lr * min(1.0, (samples_seen + 1) / max(config.warmup, 1))
    if config.decay == "cosine":
        if config.samples is None:
            raise ValueError("decay='cosine' needs samples, the length of the whole run")
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, samples_seen / config.samples)))
    return rate


class State:
    """What a checkpoint holds: the module, its moving average, the optimizer and the number of samples seen."""

    def __init__(self, module: nn.Module, config: TrainConfig) -> None:
        self.module = module
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.average = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        self.optimizer = _optimizer(module, config)
        self.scaler: Any = None  # of the loss, in fp16
        self.samples = 0

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": tensor for name, tensor in self.module.state_dict().items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.average.items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
        scales = {} if self.scaler is None else self.scaler.state_dict()
        return tensors | {f"scaler.{name}": torch.tensor(value, dtype=torch.float64) for name, value in scales.items()}

    def load(self, folder: Path) -> None:
        """Loads a checkpoint. Raises ValueError, and changes nothing, if it is damaged or of another model."""
        own = {f"{part}.{name}": tuple(t.shape) for part in ("model", "ema") for name, t in self.average.items()}
        samples, tensors = run.read_checkpoint(folder, own)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}, "scaler": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        moments: dict[int, dict[str, Tensor]] = {}
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            if not index.isdecimal() or int(index) >= len(trained):
                raise ValueError(f"{folder} is damaged: optimizer.{name} is of no parameter")
            if tensor.numel() > 1 and tensor.shape != trained[int(index)].shape:
                raise ValueError(f"{folder} is damaged: optimizer.{name} has the shape of another parameter")
            moments.setdefault(int(index), {})[key] = tensor
        self.module.load_state_dict(parts["model"])
        for name, tensor in parts["ema"].items():
            self.average[name].copy_(tensor)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        if self.scaler is not None and parts["scaler"]:
            now = self.scaler.state_dict()
            self.scaler.load_state_dict({name: type(now[name])(x.item()) for name, x in parts["scaler"].items()})
        self.samples = samples

    def resume(self, out: Path) -> list[str]:
        """Loads the last sound checkpoint of a run, if it has any. Returns a note for each damaged one.

        Raises ValueError if all are damaged.
        """
        faults: list[str] = []
        for folder in reversed(run.checkpoints(out)):
            try:
                self.load(folder)
            except ValueError as error:
                faults.append(str(error))
            else:
                return [f"{fault}; going on from {folder.name}" for fault in faults]
        if faults:
            raise ValueError(faults[0])
        return []

    def with_average(self, call: Callable[[], object]) -> object:
        """Result of call() while the module has the averaged weights."""
        current = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        try:
            self.module.load_state_dict(self.average)
            self.module.eval()
            with torch.no_grad():
                return call()
        finally:
            self.module.load_state_dict(current)
            self.module.train()


def _optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW([p for _, p in named], config.lr, betas=BETAS, weight_decay=config.weight_decay)
    edges = getattr(module, "edges", ())
    inner = {name for name, p in named if p.ndim > 1 and not any(edge in name for edge in edges)}
    return Muon(
        [p for name, p in named if name in inner],
        [p for name, p in named if name not in inner],
        lr=config.lr,
        weight_decay=config.weight_decay,
    )


def load_average(module: nn.Module, out: Path) -> int:
    """Fills module with the averaged weights of a run's last sound checkpoint. Returns its number of samples."""
    state = State(module, TrainConfig())
    state.resume(out)
    if not run.checkpoints(out):
        raise FileNotFoundError(f"{out} holds no checkpoint; train into it first")
    module.load_state_dict(state.average)
    return state.samples


def fit(task: Task, config: TrainConfig, out: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
    """Trains task until config.samples or config.minutes are over, from the last sound checkpoint in `out`, if any.

    Writes a checkpoint, and the task's export of the averaged weights to out/export. Raises ValueError if out holds a
    run of something else, FloatingPointError for a loss or weights that are not finite, and KeyboardInterrupt after it
    was told to stop and has saved and exported.
    """
    assert isinstance(task, nn.Module), "a task is a module, so that its parameters are found"
    if config.samples is None and config.minutes is None:
        raise ValueError("give minutes or samples, or training would never end")
    with Stop() as stop:
        _run(task, config, out, stop, clock)
        if stop.asked:
            raise KeyboardInterrupt


def _run(task: Task, config: TrainConfig, out: Path, stop: Stop, clock: Callable[[], float]) -> None:
    assert isinstance(task, nn.Module)
    accelerator = Accelerator(mixed_precision=config.precision)
    main = accelerator.is_main_process
    stop.once = TORCHRUN_SECONDS if accelerator.num_processes > 1 else 0
    task.to(accelerator.device)
    state = State(task, config)
    state.scaler = accelerator.scaler
    settings = config.model_dump(mode="json") | getattr(task, "settings", {})
    changes = run.changes(out, settings, new_data=config.new_data)
    notes = [*getattr(task, "notes", ()), *state.resume(out)]
    with stop.idle():
        getattr(task, "prepare", lambda say: None)(say if main else lambda text: None)
    wrapped, optimizer = accelerator.prepare(task, state.optimizer)
    begin = clock()
    batch = config.batch_size * accelerator.num_processes
    keeper = Keeper(task, state, config, out, settings, clock) if main else None
    try:
        if keeper is not None:
            keeper.begin(notes, changes, stop)
        task.train()
        while not _over(state.samples, config, clock() - begin, stop, accelerator):
            numbers = np.arange(config.batch_size) + state.samples + accelerator.process_index * config.batch_size
            indices = order(task.size, config.seed, numbers)
            for group in optimizer.param_groups:
                group["lr"] = group.get("share", 1.0) * learning_rate(state.samples, config)
            with accelerator.autocast():
                loss = wrapped(torch.from_numpy(indices), torch.from_numpy(numbers))
            if not math.isfinite(value := accelerator.reduce(loss.detach(), "mean").item()):
                raise FloatingPointError(_diverged(value, state.samples, indices.tolist(), out))
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(state.parameters, config.clip)
            optimizer.step()
            state.samples += batch
            update_ema(state.average, task.state_dict(), ema_decay(state.samples, batch, config.half_life))
            if keeper is not None:
                keeper.step(value, stop)
        if keeper is not None:
            keeper.finish(stop)
    finally:
        if keeper is not None:
            keeper.bar.stop()
    accelerator.wait_for_everyone()


def _diverged(value: float, samples: int, indices: list[int], out: Path) -> str:
    last = next((path.name for path in reversed(run.checkpoints(out))), "none")
    return f"loss is {value} after {samples} samples, items {indices}; last checkpoint: {last}; try a lower --lr"


def _over(samples: int, config: TrainConfig, seconds: float, stop: Stop, accelerator: Accelerator) -> bool:
    """Whether the budget is spent (by the main process's clock) or a process was told to stop."""
    if config.samples is not None and samples >= config.samples:
        return True
    late = config.minutes is not None and seconds > 60 * config.minutes and accelerator.is_main_process
    if accelerator.num_processes == 1:
        return late or stop.asked
    votes = torch.tensor(float(late or stop.asked), device=accelerator.device)
    return bool(accelerator.reduce(votes, "sum").item() > 0)
