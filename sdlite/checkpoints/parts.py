"""The parts of a model in memory: built without memory for weights, filled strictly, checked, hashed.

    config --> modules on "meta" --> names and shapes equal? --> weights, finite? --> ModelParts

Memory is allocated only after names and shapes are checked.
"""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sdlite.checkpoints.places import CheckpointError
from sdlite.checkpoints.sd_names import Part
from sdlite.checkpoints.weights import FLOATS, Weights, from_files
from sdlite.config import UNTRAINED_NOTE, ModelConfig, ScheduleConfig, Sides
from sdlite.models import Network, network
from sdlite.models.codec import LatentCodec
from sdlite.models.text import TextEncoder

Shapes = Mapping[str, tuple[int, ...]]
Renaming = Callable[[Mapping[str, Any]], dict[str, Any]]  # from a file's names to a module's; may drop some
UNTRAINED = "untrained (random weights)"  # name of a model without training, in its files too
SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class ModelParts:
    """A loaded model. hash: sha256 of all weights, the same for every file layout. notes: what was guessed, and why."""

    text: TextEncoder
    denoiser: Network
    codec: LatentCodec
    config: ModelConfig
    name: str
    hash: str
    notes: tuple[str, ...] = ()

    @property
    def modules(self) -> dict[Part, nn.Module]:
        """The modules that hold weights."""
        return {"text": self.text.model, "denoiser": self.denoiser, "codec": self.codec.model}

    @property
    def is_untrained(self) -> bool:
        return UNTRAINED_NOTE in self.notes


def empty_parts(config: ModelConfig, tokenizer: Any, name: str, codec: LatentCodec | None = None) -> ModelParts:
    """Parts without memory for their weights, except a codec that is given. Raises ValueError if they cannot be."""
    with torch.device("meta"):
        text, denoiser = TextEncoder(config.text, tokenizer), network(config.denoiser)
        return ModelParts(text, denoiser, codec or LatentCodec(config.codec), config, name, "")


def gathered(
    text: object, denoiser: object, codec: object, schedule: ScheduleConfig, sample_size: Sides, notes: tuple[str, ...]
) -> ModelParts:
    """The parts of a pipeline as `save_folder` takes them. Raises ValueError for a part that is no network of ours."""
    if not isinstance(denoiser, Network):
        raise ValueError(f"a {type(denoiser).__name__} cannot be saved; save the pipeline whose denoiser sdlite loaded")
    if not isinstance(text, TextEncoder) or not isinstance(codec, LatentCodec):
        other = codec if isinstance(text, TextEncoder) else text
        raise ValueError(f"a {type(other).__name__} cannot be saved; save the pipeline whose parts sdlite loaded")
    configs = {"denoiser": denoiser.config, "text": text.config, "codec": codec.config}
    config = ModelConfig(**configs, schedule=schedule, sample_size=sample_size)
    return ModelParts(text, denoiser, codec, config, "", "", notes)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def fill(module: nn.Module, weights: Weights, what: str, renamed: Renaming = dict) -> list[str]:
    """Gives a module its weights. Returns notes on weights that are not used.

    Raises CheckpointError if a weight is missing, has another shape or is not finite.
    """
    keys = from_files(what, renamed, {name: name for name in weights.shapes})
    expected = shapes_of(module)
    found = {name: weights.shapes[key] for name, key in keys.items()}
    notes = check_same(expected, found, what, from_files(what, renamed, weights.unread))
    tensors = weights.read(keys[name] for name in expected)
    module.load_state_dict({name: tensors[keys[name]] for name in expected}, assign=True)
    return notes


def check_same(expected: Shapes, found: Shapes, what: str, unread: Mapping[str, str] | None = None) -> list[str]:
    """A note, in a list, on tensors that are found and not expected; they are not used.

    unread: names and dtypes of tensors that are no weights. Raises CheckpointError with the first differences and their
    likely cause if one that is expected is missing or has another shape.
    """
    unread = unread or {}
    missing = [
        f"{name} is in {unread[name]}, not one of {', '.join(FLOATS)}" if name in unread else f"{name} is missing"
        for name in expected
        if name not in found
    ]
    reshaped = [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    extra = [name for name in found if name not in expected]
    if not missing and not reshaped:
        return [f"{what}: not used: {_first(extra)}"] if extra else []
    differences = [*missing, *(f"{name} is not expected" for name in extra), *reshaped]
    if 2 * len(differences) > len(expected):
        cause = "these are another model's weights, or another model's config"
    elif extra:
        cause = "the file was edited or is another model's"
    else:
        cause = "the file is incomplete" if missing else "the config is another model's"
    raise CheckpointError(f"{what}: {_first(differences)}. Likely {cause}.")


def _first(entries: list[str]) -> str:
    """The first few, and how many more there are."""
    more = len(entries) - SHOWN_DIFFERENCES
    return "; ".join(entries[:SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def finished(parts: ModelParts, notes: list[str]) -> ModelParts:
    """Filled parts with hash and notes, ready to draw. Raises CheckpointError if they do not fit each other."""
    denoiser, features, kind = parts.config.denoiser, parts.config.text.hidden_size, type(parts.denoiser).__name__
    if features != denoiser.context_dim:
        fault = f"the text encoder gives {features} features, but the {kind} takes {denoiser.context_dim}"
        raise CheckpointError(f"{parts.name}: {fault}; they belong to different models")
    latents = parts.config.codec.latent_channels
    if denoiser.in_channels not in (latents, 2 * latents + 1) or denoiser.out_channels != latents:
        fault = f"from {denoiser.in_channels} to {denoiser.out_channels} channels does not fit a codec of {latents}"
        fits = f"{latents} to {latents} and, for inpainting, {2 * latents + 1} to {latents}"
        raise CheckpointError(f"{parts.name}: a {kind} {fault}; sdlite runs {fits}")
    for module in (parts.text, parts.denoiser, parts.codec):
        module.eval()
    return replace(parts, hash=weights_hash(parts.modules), notes=tuple(notes))


def weights_hash(modules: Mapping[Any, nn.Module]) -> str:
    """sha256 over names, shapes and float32 values of all weights: the same for every file layout of a model."""

    def digest(name: str, tensor: Tensor) -> bytes:
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        start = f"{name} {tuple(values.shape)} ".encode()
        return hashlib.sha256(start + hashlib.sha256(values.view(-1).numpy().data).digest()).digest()

    named = {f"{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = pool.map(digest, sorted(named), [named[name] for name in sorted(named)])
    return hashlib.sha256(b"".join(digests)).hexdigest()
