"""A task, and what a checkpoint of its training holds: weights, their moving average, the optimizer, the samples seen.

The average of the weights has a lower held-out loss than the weights (notebook 04).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdlite.training import run
from sdlite.training.muon import BETAS, Muon
from sdlite.training.options import TrainConfig

RAMP = 0.05  # half life as a part of the samples seen, so that the random start is soon forgotten (Karras et al. 2024)


class Task(nn.Module):
    """What to learn: a module that gives the loss of a batch. Training changes its parameters and nothing else.

    size: number of items in the training data. settings: what it was made with; they must be the same when the run is
    resumed (see `run.changes`). notes: texts for the user. previews: number of images in its preview. begun: whether it
    can draw before the first sample; then a preview is shown before training too. edges: parts of the names of matrices
    that AdamW trains instead of Muon: first and last layer, embeddings.
    """

    size: int
    previews = 0
    begun = False
    edges: Sequence[str] = ()

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {}
        self.notes: list[str] = []

    def prepare(self, say: Callable[[str], None]) -> None:
        """Does slow work, after the check of the settings. say: tells the user."""

    def forward(self, indices: Tensor, numbers: Tensor) -> Tensor:
        """Mean loss of items `indices`, (B,) int64; all randomness comes from the sample `numbers`, (B,) int64."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, with the current weights."""
        raise NotImplementedError

    def preview(self, path: Path) -> None:
        """Writes a PNG that shows what the current weights do."""
        raise NotImplementedError

    def export(self, folder: Path) -> None:
        """Writes what later stages load into an empty folder."""
        raise NotImplementedError


def ema_decay(samples_seen: int, batch: int, half_life: int) -> float:
    """Factor of the old average at an update after `samples_seen` samples: one half per half life.

    half_life: in samples. Source: NVlabs/edm, training_loop.py, ema_halflife_kimg and ema_rampup_ratio.
    """
    return 0.5 ** (batch / max(min(half_life, RAMP * samples_seen), 1e-8))


@torch.no_grad()
def update_ema(average: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """In place: average = decay * average + (1 - decay) * weights; what is no float is copied."""
    for name, mean in average.items():
        if mean.is_floating_point():
            mean.lerp_(weights[name].detach().to(mean.dtype), 1 - decay)
        else:
            mean.copy_(weights[name])


class State:
    """What a checkpoint holds: the task, its moving average, the optimizer and the number of samples seen.

    scaler: of the loss, in fp16.
    """

    def __init__(self, module: Task, config: TrainConfig, scaler: Any = None) -> None:
        self.module, self.scaler, self.samples = module, scaler, 0
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.average = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        self.optimizer = _optimizer(module, config)

    def settings(self, config: TrainConfig) -> dict[str, Any]:
        """The content of config.json."""
        return config.settings() | self.module.settings

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": tensor for name, tensor in self.module.state_dict().items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.average.items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in moments.items()}
        scales = {} if self.scaler is None else self.scaler.state_dict()
        return tensors | {f"scaler.{name}": torch.tensor(value, dtype=torch.float64) for name, value in scales.items()}

    def load(self, folder: Path) -> None:
        """Loads a checkpoint. Raises ValueError, and changes nothing, if it is damaged or of another model."""
        samples, tensors = run.read_checkpoint(folder, _shapes(self.average))
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}, "scaler": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        moments = self._moments(parts["optimizer"], folder)
        self.module.load_state_dict(parts["model"])
        for name, tensor in parts["ema"].items():
            self.average[name].copy_(tensor)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        if self.scaler is not None and parts["scaler"]:
            now = self.scaler.state_dict()
            self.scaler.load_state_dict({name: type(now[name])(x.item()) for name, x in parts["scaler"].items()})
        self.samples = samples

    def _moments(self, tensors: Mapping[str, Tensor], folder: Path) -> dict[int, dict[str, Tensor]]:
        """The optimizer's state, by the number of the parameter and the name of the moment."""
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, _, key = name.partition(".")
            if not index.isdecimal() or int(index) >= len(trained):
                raise ValueError(f"{folder} is damaged: optimizer.{name} is of no parameter")
            if tensor.numel() > 1 and tensor.shape != trained[int(index)].shape:
                raise ValueError(f"{folder} is damaged: optimizer.{name} has the shape of another parameter")
            moments.setdefault(int(index), {})[key] = tensor
        return moments

    def resume(self, out: Path) -> list[str]:
        """Loads the last sound checkpoint of a run, if it has any. Returns a note for each damaged one.

        Raises ValueError if all are damaged.
        """
        return run.last_sound(out, self.load)[1]

    def with_average(self, call: Callable[[], object]) -> None:
        """Calls while the module has the averaged weights."""
        current = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        try:
            self.module.load_state_dict(self.average)
            self.module.eval()
            with torch.no_grad():
                call()
        finally:
            self.module.load_state_dict(current)
            self.module.train()


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights and of their average in a checkpoint."""
    return {f"{part}.{name}": tuple(tensor.shape) for part in ("model", "ema") for name, tensor in weights.items()}


def _optimizer(module: Task, config: TrainConfig) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW([p for _, p in named], config.lr, betas=BETAS, weight_decay=config.weight_decay)
    inner = {name for name, p in named if p.ndim > 1 and not any(edge in name for edge in module.edges)}
    matrices, others = [p for name, p in named if name in inner], [p for name, p in named if name not in inner]
    return Muon(matrices, others, lr=config.lr, weight_decay=config.weight_decay)


def load_average(module: nn.Module, out: Path) -> int:
    """Fills module with the averaged weights of a run's last sound checkpoint. Returns its number of samples."""
    own = _shapes(module.state_dict())
    found, _ = run.last_sound(out, lambda folder: run.read_checkpoint(folder, own))
    if found is None:
        raise FileNotFoundError(f"{out} holds no checkpoint; train into it first")
    samples, tensors = found
    average = {name.removeprefix("ema."): tensor for name, tensor in tensors.items() if name.startswith("ema.")}
    module.load_state_dict(average)
    return samples
