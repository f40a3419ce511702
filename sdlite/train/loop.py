"""The one training loop: any task, any number of processes, to the end of a time budget, exactly resumable.

    sample numbers n, n+1, ... --order--> indices --task--> loss --AdamW, EMA--> weights --> OUT/state-<samples>/

Progress is counted in samples. Whatever is random, order and augmentation and noise, is derived from the seed and the
number of the sample, and rates from the samples seen; so a run that was stopped and resumed has the weights of one
that was not, and P processes with batch B compute what one does with batch P B.

OUT holds config.json, log.jsonl with a line per report, and one folder per checkpoint, which appears whole or not at
all: safetensors in shards under 16 MB (weights, their average, AdamW's moments) and state.json.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from pydantic import Field
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdlite.config import Record
from sdlite.train.curves import draw_curves
from sdlite.train.ema import ema_decay, update_ema
from sdlite.train.muon import BETAS, Muon

SHARD_BYTES = 15 * 2**20  # so that a file stays under 16 MB with its header
KEPT = 2  # checkpoints: the last, and the one before it should the last be damaged


class TrainConfig(Record):
    """How to train. All lengths are in samples; minutes is the budget of this call, samples that of the whole run.

    optimizer: "muon" is for all matrices and kernels but the task's `edges`, whose rate is then lr; AdamW for the rest.
    decay: "cosine" lets the rate fall to zero at `samples`. precision: of autocast. half_life: of the EMA.
    save_minutes, show_minutes: between checkpoints, and between figures on held-out data with a preview; 0 is only at
    the end. plot: draw curves.png whenever figures are taken.
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
    plot: bool = False


# What may change when a run is resumed:
PER_CALL = {"minutes", "samples", "precision", "report_every", "save_minutes", "show_minutes", "plot"}


class Task(Protocol):
    """What to learn: a module that gives the loss of a batch. Its parameters are trained; all else stays fixed.

    It may have `settings`, a dict: what it must have been made with, beside the config, when its run is resumed; and
    `edges`, parts of the names of matrices that Muon must leave to AdamW: the first and the last layer, embeddings.
    """

    @property
    def size(self) -> int:
        """Items of the training data."""

    def __call__(self, indices: Tensor, numbers: Tensor) -> Tensor:
        """Mean loss of items `indices`, (B,) int64; all randomness comes from the sample `numbers`, (B,) int64."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, with the current weights."""

    def preview(self, path: Path) -> None:
        """Writes a PNG that shows what the current weights do."""

    def export(self, folder: Path) -> None:
        """Writes what later stages load."""


def order(size: int, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Item of each sample number: every epoch is a permutation of its own. (B,) -> (B,) int64."""
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
        self.samples = 0

    def save(self, folder: Path) -> None:
        """Writes folder in one step."""
        tensors = {f"model.{name}": tensor for name, tensor in self.module.state_dict().items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.average.items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for i, shard in enumerate(_shards(tensors)):
            save_file(shard, temporary / f"state-{i:05}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"samples": self.samples, "tensors": len(tensors)}))
        temporary.replace(folder)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote. Raises ValueError if it is not whole or of another model."""
        stated = json.loads((folder / "state.json").read_text())
        tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        ours = {name: tensor.shape for name, tensor in self.module.state_dict().items()}
        theirs = {name: tensor.shape for name, tensor in parts["model"].items()}
        if len(tensors) != stated["tensors"] or ours != theirs or parts["ema"].keys() != self.average.keys():
            raise ValueError(f"{folder} is damaged or of another model; delete it, or train into another folder")
        self.module.load_state_dict(parts["model"])
        for name, tensor in parts["ema"].items():
            self.average[name].copy_(tensor)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.samples = stated["samples"]

    def with_average(self, call: Callable[[], object]) -> object:
        """Result of call() while the module has the averaged weights."""
        current = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        self.module.load_state_dict(self.average)
        self.module.eval()
        try:
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


def _shards(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
    return shards


def checkpoints(out: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(path for path in out.glob("state-*") if (path / "state.json").is_file())


def load_average(module: nn.Module, out: Path) -> int:
    """Fills module with the averaged weights of a run's last checkpoint; the samples that it had seen."""
    if not checkpoints(out):
        raise FileNotFoundError(f"{out} holds no checkpoint; train into it first")
    state = State(module, TrainConfig())
    state.load(checkpoints(out)[-1])
    module.load_state_dict(state.average)
    return state.samples


def fit(task: Task, config: TrainConfig, out: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
    """Trains task until config.samples or config.minutes are over, from the last checkpoint in `out` if there is one.

    Leaves a checkpoint, and in out/export the averaged weights as the task exports them. Raises ValueError if out is a
    run with another config, FloatingPointError for a loss that is not finite.
    """
    assert isinstance(task, nn.Module), "a task is a module, so that its parameters are found"
    if config.samples is None and config.minutes is None:
        raise ValueError("give minutes or samples, or training would never end")
    accelerator = Accelerator(mixed_precision=config.precision)
    main = accelerator.is_main_process
    task.to(accelerator.device)
    state = State(task, config)
    if main:
        _check_config(config.model_dump(mode="json") | getattr(task, "settings", {}), out)
    if checkpoints(out):
        state.load(checkpoints(out)[-1])
    wrapped, optimizer = accelerator.prepare(task, state.optimizer)
    begin = saved = shown = clock()
    batch = config.batch_size * accelerator.num_processes
    report = _Report(out, config, state.samples, clock) if main else None
    task.train()
    while not _over(state.samples, config, clock() - begin, accelerator):
        numbers = np.arange(config.batch_size) + state.samples + accelerator.process_index * config.batch_size
        indices = order(task.size, config.seed, numbers)
        for group in optimizer.param_groups:
            group["lr"] = group.get("share", 1.0) * learning_rate(state.samples, config)
        with accelerator.autocast():
            loss = wrapped(torch.from_numpy(indices), torch.from_numpy(numbers))
        if not math.isfinite(value := accelerator.reduce(loss.detach(), "mean").item()):
            last = checkpoints(out)[-1].name if checkpoints(out) else "none"
            raise FloatingPointError(
                f"loss is {value} after {state.samples} samples, items {indices.tolist()}; last checkpoint: {last}; "
                "try a lower --lr"
            )
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(state.parameters, config.clip)
        optimizer.step()
        state.samples += batch
        update_ema(state.average, task.state_dict(), ema_decay(state.samples, batch, config.half_life))
        if report is not None:
            report.step(value, state)
            if config.save_minutes and clock() - saved > 60 * config.save_minutes:
                _save(state, out)
                saved = clock()
            if config.show_minutes and clock() - shown > 60 * config.show_minutes:
                state.with_average(lambda: _show(task, state.samples, out, config.plot))
                shown = clock()
    if report is not None:
        report.close()
        _save(state, out)
        state.with_average(lambda: _show(task, state.samples, out, config.plot))
        state.with_average(lambda: task.export(out / "export"))
    accelerator.wait_for_everyone()


def _over(samples: int, config: TrainConfig, seconds: float, accelerator: Accelerator) -> bool:
    """Whether the budget is spent; the main process's clock decides for all."""
    if config.samples is not None and samples >= config.samples:
        return True
    if config.minutes is None:
        return False
    late = torch.tensor(float(seconds > 60 * config.minutes and accelerator.is_main_process), device=accelerator.device)
    return bool(accelerator.reduce(late, "sum").item() > 0)


def _check_config(ours: dict[str, Any], out: Path) -> None:
    """Writes config.json, or holds ours against the one that is there."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.json"
    if path.is_file():
        theirs = json.loads(path.read_text())
        for name in ours.keys() - PER_CALL:
            if ours[name] != theirs.get(name, ours[name]):
                raise ValueError(
                    f"{out} is a run with {name}={theirs[name]}, not {ours[name]}; resume it with that, or give "
                    "another folder"
                )
    path.write_text(json.dumps(ours, indent=1) + "\n")


def _save(state: State, out: Path) -> None:
    folder = out / f"state-{state.samples:010}"
    if not folder.exists():
        state.save(folder)
    for old in checkpoints(out)[:-KEPT]:
        shutil.rmtree(old)


def _show(task: Task, samples: int, out: Path, plot: bool) -> None:
    """Figures on held-out data into the log, and pictures of what the task can do by now."""
    figures = task.evaluate()
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps({"samples": samples, **figures}) + "\n")
    print(f"{samples} samples, " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)
    task.preview(out / f"preview-{samples:010}.png")
    if plot:
        draw_curves(out / "log.jsonl", out / "curves.png")


class _Report:
    """A line in log.jsonl and on the screen every `report_every` samples, and a progress bar."""

    def __init__(self, out: Path, config: TrainConfig, samples: int, clock: Callable[[], float]) -> None:
        self.log, self.config, self.clock = out / "log.jsonl", config, clock
        self.losses: list[float] = []
        self.samples, self.time = samples, clock()
        self.bar = Progress(transient=True)
        self.row = self.bar.add_task("training", total=config.samples, completed=samples)
        self.bar.start()

    def step(self, loss: float, state: State) -> None:
        self.losses.append(loss)
        self.bar.update(self.row, completed=state.samples)
        if state.samples - self.samples < self.config.report_every:
            return
        rate = (state.samples - self.samples) / max(self.clock() - self.time, 1e-9)
        line = {
            "samples": state.samples,
            "loss": sum(self.losses) / len(self.losses),
            "lr": state.optimizer.param_groups[0]["lr"],
            "samples_per_second": rate,
            "time": time.time(),
        }
        with self.log.open("a") as log:
            log.write(json.dumps(line) + "\n")
        self.bar.console.print(f"{state.samples} samples, loss {line['loss']:.4f}, {rate:.1f} samples/s")
        self.losses, self.samples, self.time = [], state.samples, self.clock()

    def close(self) -> None:
        self.bar.stop()
