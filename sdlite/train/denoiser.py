"""The denoiser task: a UNet or DiT on latents and contexts that codec and text encoder made once.

    pictures --views--> images, captions --codec, text--> x_0, context   (kept in OUT/cache.safetensors)
    x_0, noise --add_noise(t)--> x_t --network(context or "")--> v or eps;  loss = its weighted squared error

Every picture has several views, each with a caption of its own: plain, mirrored, composed (augment.py), mirrored, and
so on. One sample in ten has the empty prompt, which guidance needs (Ho and Salimans 2022).
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn

from sdlite.checkpoints.load import ModelParts, assembled
from sdlite.checkpoints.save import save_folder
from sdlite.config import DenoiserConfig, DiTConfig, ModelConfig, Record, Request, ScheduleConfig, UNetConfig
from sdlite.diffusion.loss import diffusion_loss
from sdlite.diffusion.schedule import Schedule
from sdlite.images import contact_sheet
from sdlite.models.codec import LatentCodec
from sdlite.models.dit import DiT
from sdlite.models.networks import Network, network
from sdlite.models.text import TextEncoder
from sdlite.pipeline import Pipeline
from sdlite.train.augment import SIDED, Example, augmented
from sdlite.train.data import (
    Generator,
    Records,
    caption_of,
    keep,
    load_pixels,
    normal,
    on_white,
    read_records,
    sample_generator,
)

DROPPED = 0.1  # part of the samples without a caption
HELD_OUT = 256  # pictures whose loss is measured
GOLDEN = (5**0.5 - 1) / 2
LEVELS = 8  # timesteps, evenly spread, at which it is measured
SHOWN = 24  # pictures of the preview
PREVIEW_STEPS, PREVIEW_GUIDANCE = 20, 3.0
SHARD_BYTES = 15 * 2**20  # so that a file stays under 16 MB with its header


def emoji_unet(latent_channels: int = 8, context_dim: int = 256) -> UNetConfig:
    """The shipped model's: 14 million parameters for 16x16 latents."""
    return UNetConfig(
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(64, 128, 224),
        layers_per_block=1,
        attention_stages=(False, True, True),
        num_heads=(2, 4, 7),
        context_dim=context_dim,
        use_linear_projection=True,
        prediction="v",
    )


def emoji_dit(latent_channels: int = 8, context_dim: int = 256, sample_size: int = 16) -> DiTConfig:
    """13.8 million parameters for 16x16 latents: those of a UNet of widths 64, 128 and 224, to 0.1 %."""
    return DiTConfig(
        in_channels=latent_channels,
        out_channels=latent_channels,
        patch_size=2,
        width=272,
        depth=11,
        num_heads=4,
        context_dim=context_dim,
        sample_size=sample_size,
        prediction="v",
    )


class Objective(Record):
    """What the denoiser learns. The defaults are the shipped model's; the figures behind them are on its card.

    timesteps: "logit_normal" draws more of the middle ones (Esser et al. 2024, section 3.1: location 0, scale 1).
    min_snr_gamma: of `min_snr_weight`; None weighs all timesteps alike. zero_terminal_snr: the last timestep is pure
    noise, so that dark and light pictures start from the same (Lin et al. 2023); eps cannot be learned from it.
    """

    prediction: Literal["epsilon", "v"] = "v"
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    min_snr_gamma: float | None = Field(5.0, gt=0)
    zero_terminal_snr: bool = True

    @model_validator(mode="after")
    def _learnable(self) -> "Objective":
        if self.prediction == "epsilon" and self.zero_terminal_snr:
            raise ValueError("prediction=epsilon has no answer to pure noise; use v, or zero_terminal_snr=False")
        return self

    def schedule(self, start: ScheduleConfig | None = None) -> ScheduleConfig:
        """That of the model to start from, if it ends as the objective asks; else its noise up to that end."""
        if start is not None and start.zero_terminal_snr == self.zero_terminal_snr:
            return start
        end = {"zero_terminal_snr": self.zero_terminal_snr, "spacing": "trailing", "final_abar_one": True}
        return (start or ScheduleConfig()).replace(**end)


OBJECTIVE = Objective()


class Latents(NamedTuple):
    """Training data of the denoiser. x_0: (N, C, h, w); contexts: (N, T, D); empty: (1, T, D), of the empty prompt."""

    x_0: Tensor
    contexts: Tensor
    empty: Tensor


def view(
    mine: tuple[dict[str, Any], Tensor], other: tuple[dict[str, Any], Tensor], number: int, generator: Generator
) -> tuple[Tensor, str]:
    """Image (4, S, S) uint8 and caption: of four views one is plain, two mirrored where that is right, one composed."""
    record, pixels = mine
    caption = caption_of(record, generator)
    if number % 4 == 0 or "concept" not in record:
        return pixels, caption
    if number % 2:
        return (pixels if SIDED.search(str(record["concept"])) else pixels.flip(-1)), caption
    first, second = (
        Example(Image.fromarray(p.permute(1, 2, 0).numpy()), str(r["concept"]), str(r.get("style", "")))
        for r, p in (mine, other)
    )
    made = augmented(first, second, generator)
    return torch.frombuffer(bytearray(made.image.tobytes()), dtype=torch.uint8).view(*pixels.shape[1:], 4).permute(
        2, 0, 1
    ), made.caption


@torch.no_grad()
def encode(
    codec: LatentCodec, text: TextEncoder, records: Records, pixels: Tensor, *, views: int, seed: int, batch: int = 32
) -> Latents:
    """All views of all records as latents and contexts, in float16."""
    x_0, contexts = [], []
    for number in range(views):
        for start in range(0, len(records), batch):
            rows = range(start, min(start + batch, len(records)))
            made = []
            for i in rows:
                generator = sample_generator(seed, number * len(records) + i)
                j = int(generator.integers(len(records)))
                made.append(view((records[i], pixels[i]), (records[j], pixels[j]), number, generator))
            x_0.append(codec.encode(on_white(torch.stack([image for image, _ in made]))).half())
            contexts.append(encode_captions(text, [caption for _, caption in made]).half())
    return Latents(torch.cat(x_0), torch.cat(contexts), encode_captions(text, [""]).half())


@torch.no_grad()
def encode_captions(text: TextEncoder, captions: list[str]) -> Tensor:
    """(B, T, D) as the pipeline encodes them, but in one batch; a caption beyond T tokens is cut."""
    tokens = text.tokenizer(
        captions, padding="max_length", truncation=True, max_length=text.config.max_position_embeddings,
        return_tensors="pt",
    )["input_ids"]  # fmt: skip
    return text.model(tokens).last_hidden_state


class DenoiserTask(nn.Module):
    """Learns to predict the noise, or the velocity, in the latents of a data folder.

    parts: codec and text encoder, frozen. config: of the network, whose prediction the objective sets; a DiT's
    sample_size must be the pictures'. views: of each picture. cache: file that keeps the latents and contexts.
    """

    def __init__(
        self,
        data: Path,
        parts: tuple[LatentCodec, TextEncoder],
        config: DenoiserConfig,
        *,
        size: int = 128,
        views: int = 4,
        cache: Path | None = None,
        seed: int = 0,
        objective: Objective = OBJECTIVE,
    ) -> None:
        super().__init__()
        self.seed, self.objective = seed, objective
        self.sample_size = size // parts[0].factor
        if isinstance(config, DiTConfig) and config.sample_size != self.sample_size:
            raise ValueError(f"sample_size={config.sample_size} must be {self.sample_size}: pictures of {size} pixels")
        self.denoiser = network(config.replace(prediction=objective.prediction))
        initialize(self.denoiser, torch.Generator().manual_seed(seed))
        self.schedule = Schedule(objective.schedule())
        self.parts = parts  # in a tuple: not modules of this one, so neither trained nor saved with it
        self.records, self.held_records = read_records(data), read_records(data, "validation")
        known = hashlib.sha256(json.dumps(self.records).encode()).hexdigest()[:12]
        self.settings = {"data": known, "size": size, "start": "", **objective.model_dump()}  # of a run and its resume
        pixels = load_pixels(data, self.records, size)
        self.latents = _cached(cache, lambda: encode(*parts, self.records, pixels, views=views, seed=seed))
        held = (self.held_records or self.records)[:HELD_OUT]
        self.held_out = encode(*parts, held, load_pixels(data, held, size), views=1, seed=seed)

    def start_from(self, model: ModelParts) -> None:
        """Its weights and noise, of training on other pictures, say, or at half the size: a quarter of the cost."""
        if model.denoiser.config != self.denoiser.config:
            raise ValueError("the denoiser to start from has another shape or prediction; take the same config")
        self.denoiser.load_state_dict(model.denoiser.state_dict())
        self.schedule = Schedule(self.objective.schedule(model.config.schedule))
        self.settings["start"] = model.hash[:12]

    @property
    def size(self) -> int:
        return len(self.latents.x_0)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, indices: Tensor, numbers: Tensor) -> Tensor:
        generators = [sample_generator(self.seed, int(n)) for n in numbers]
        t = self._timesteps(numbers)
        dropped = torch.tensor([g.random() < DROPPED for g in generators])
        noise = normal(generators, tuple(self.latents.x_0.shape[1:]))
        contexts = torch.where(dropped[:, None, None], self.latents.empty, self.latents.contexts[indices])
        return self._loss(self.latents.x_0[indices], contexts, t, noise)

    def _timesteps(self, numbers: Tensor) -> Tensor:
        """(B,) int64, evenly spread over any few samples in a row, which steadies the loss.

        Multiples of the golden ratio modulo 1; Kingma et al. 2021 (Variational Diffusion Models), appendix I.1, spread
        those of a batch for the same reason.
        """
        part = (numbers.double() * GOLDEN).frac()
        if self.objective.timesteps == "logit_normal":
            part = torch.special.ndtri(part).sigmoid()
        return (part * self.schedule.config.num_train_steps).long()

    def _loss(self, x_0: Tensor, contexts: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        x_0, contexts, t, noise = (tensor.to(self.device) for tensor in (x_0.float(), contexts.float(), t, noise))
        gamma = self.objective.min_snr_gamma
        return diffusion_loss(self.denoiser, self.schedule, x_0, contexts, t=t, noise=noise, gamma=gamma)

    def evaluate(self) -> dict[str, float]:
        """Loss of held-out pairs, and of as many trained pictures, at the same timesteps with the same noise."""
        return {"held_out_loss": self._measured(self.held_out), "trained_loss": self._measured(self.latents)}

    def _measured(self, latents: Latents) -> float:
        count = min(HELD_OUT, len(latents.x_0))
        levels = torch.linspace(0, self.schedule.config.num_train_steps - 1, LEVELS).long()
        noise = normal([sample_generator(self.seed, i) for i in range(count)], tuple(latents.x_0.shape[1:]))
        losses = [
            self._loss(latents.x_0[:count], latents.contexts[:count], t.expand(count), noise).item() for t in levels
        ]
        return sum(losses) / LEVELS

    def preview(self, path: Path) -> None:
        """Half trained captions, half held-out ones."""
        codec, text = self.parts
        held = self.held_records or self.records
        chosen = self.records[:: max(1, len(self.records) // SHOWN * 2)][: SHOWN // 2]
        chosen += held[:: max(1, len(held) // SHOWN * 2)][: SHOWN // 2]
        prompts = [str(record["text"]) for record in chosen]
        pipe = Pipeline(text, self.denoiser, codec.to(self.device), self.schedule, sample_size=self.sample_size)
        text.to(self.device)
        requests = [
            Request(prompt=p, seed=i, steps=PREVIEW_STEPS, guidance_scale=PREVIEW_GUIDANCE)
            for i, p in enumerate(prompts)
        ]
        contact_sheet(pipe.generate(requests), prompts, columns=6).save(path)

    def export(self, folder: Path) -> None:
        """The whole model in diffusers' folder layout, in float16, with a list of its sums."""
        codec, text = self.parts
        config = ModelConfig(
            denoiser=self.denoiser.config,
            schedule=self.schedule.config,
            text=text.config,
            codec=codec.config,
            sample_size=self.sample_size,
        )
        shutil.rmtree(folder, ignore_errors=True)
        parts = assembled(text, self.denoiser, codec, config, folder.name, [])
        save_folder(parts, folder, dtype=torch.float16, max_shard_size=SHARD_BYTES)
        write_sums(folder)


def write_sums(folder: Path) -> None:
    """sha256sums.txt of all weight files, which loading checks."""
    files = sorted(folder.rglob("*.safetensors"))
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}" for file in files]
    (folder / "sha256sums.txt").write_text("\n".join(sums) + "\n")


ZERO = {  # layers that start at zero, so that the network starts as one that predicts nothing
    "UNet": ("conv2", "proj_out", "to_out.0", "ff.net.2", "conv_out"),  # Dhariwal and Nichol 2021
    "DiT": ("adaln_single.linear", "attn2.to_out.0", "proj_out"),  # Peebles and Xie 2023: the gates, not what they gate
}


def initialize(denoiser: Network, generator: torch.Generator) -> None:
    """Variance-keeping weights; every residual branch and the output start at zero."""
    zero = ZERO["DiT" if isinstance(denoiser, DiT) else "UNet"]
    with torch.no_grad():
        for name, layer in denoiser.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                fan_in = layer.weight[0].numel()
                layer.weight.normal_(0, 0 if name.endswith(zero) else fan_in**-0.5, generator=generator)
                if layer.bias is not None:
                    layer.bias.zero_()
        for name, table in denoiser.named_parameters():
            if name.endswith("scale_shift_table"):  # with the zeros of adaln_single.linear: gates of zero at every t
                table.zero_()


def _cached(path: Path | None, make: Callable[[], Latents]) -> Latents:
    if path is not None and path.is_file():
        return Latents(**load_file(path))
    latents = make()
    if path is not None:
        keep(latents._asdict(), path)
    return latents
