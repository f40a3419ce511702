"""The denoiser task: a UNet or DiT on latents and contexts that codec and text encoder made once.

    pictures --views--> images, captions --codec, tokenizer--> x_0, tokens   (kept in OUT/cache.safetensors)
    x_0, noise --add_noise(t)--> x_t --network(text(tokens) or text(""))--> v or eps;  loss = its weighted squared error

Every picture has several views: plain and mirrored, whose caption is drawn anew for every sample, and composed
(augment.py), whose caption says what was composed. One sample in ten has the empty prompt, which guidance needs (Ho
and Salimans 2022).
"""

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sdlite.checkpoints.folder import save_folder
from sdlite.checkpoints.parts import ModelParts, finished
from sdlite.config import DenoiserConfig, DiTConfig, ModelConfig, Record, ScheduleConfig, UNetConfig
from sdlite.contracts import Conditioning
from sdlite.diffusion.loss import diffusion_loss
from sdlite.diffusion.schedule import Schedule
from sdlite.images.files import save_picture
from sdlite.images.sheet import contact_sheet
from sdlite.models.codec import LatentCodec
from sdlite.models.dit import DiT
from sdlite.models.networks import Network, network
from sdlite.models.text import TextEncoder
from sdlite.pipeline import About, Pipeline
from sdlite.request import Request
from sdlite.training.codec import codec_identity
from sdlite.training.datasets.data import (
    Fit,
    Generator,
    cached,
    caption_of,
    cut_notes,
    fit_notes,
    key_of,
    load_shaped,
    normal,
    sample_generator,
    tokenize,
)
from sdlite.training.datasets.folder import Records, caption_notes, fingerprints, read_records
from sdlite.training.latents import PLAIN, Latents, encode, encode_tokens, preview_prompt
from sdlite.training.text import text_identity

HALVINGS = 4  # how much smaller the coarsest level of a UNet is: latents must have sides that are multiples
DROPPED = 0.1  # part of the samples without a caption
HELD_OUT = 256  # pictures whose loss is measured
EVEN = 8  # one sample in so many has a uniform timestep whatever the others have
GOLDEN = (5**0.5 - 1) / 2
LEVELS = 8  # timesteps, evenly spread, at which it is measured
SHOWN = 24  # pictures of the preview
PREVIEW_STEPS, PREVIEW_GUIDANCE = 20, 3.0
SHARD_BYTES = 15 * 2**20  # so that a file stays under 16 MB with its header


def emoji_unet(latent_channels: int = 8, context_dim: int = 256) -> UNetConfig:
    """The default UNet of training, with attention to the prompt at all three resolutions."""
    return UNetConfig(
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(128, 160, 192),
        layers_per_block=1,
        attention_stages=(True, True, True),
        num_heads=(4, 5, 6),
        context_dim=context_dim,
        use_linear_projection=True,
        prediction="v",
    )


def emoji_dit(latent_channels: int = 8, context_dim: int = 256, sample_size: int = 16) -> DiTConfig:
    """The default DiT of training: as many parameters as `emoji_unet` within 0.2 %."""
    return DiTConfig(
        in_channels=latent_channels,
        out_channels=latent_channels,
        patch_size=2,
        width=320,
        depth=9,
        num_heads=5,
        context_dim=context_dim,
        sample_size=sample_size,
        prediction="v",
    )


class Objective(Record):
    """What the denoiser learns. The card of emoji-128 compares these choices.

    timesteps: "logit_normal" draws more of the middle ones (Esser et al. 2024, section 3.1: location 0, scale 1), but
    one sample in EVEN is uniform, so that the last timestep, where drawing begins, is learned as well.
    min_snr_gamma: see `min_snr_weight`; None weighs all timesteps alike. zero_terminal_snr: makes the last timestep
    pure noise, so that dark and light images start from the same noise (Lin et al. 2023); eps cannot be learned there.
    """

    prediction: Literal["epsilon", "v"] = "v"
    timesteps: Literal["uniform", "logit_normal"] = "logit_normal"
    min_snr_gamma: float | None = Field(5.0, gt=0)
    zero_terminal_snr: bool = True

    @model_validator(mode="after")
    def _learnable(self) -> "Objective":
        if self.prediction == "epsilon" and self.zero_terminal_snr:
            raise ValueError("prediction=epsilon has no answer to pure noise; use v, or zero_terminal_snr=False")
        return self

    def schedule(self, start: ScheduleConfig | None = None) -> ScheduleConfig:
        """The schedule of the model to start from, with another end if the objective asks for one."""
        if start is not None and start.zero_terminal_snr == self.zero_terminal_snr:
            return start
        end = {"zero_terminal_snr": self.zero_terminal_snr, "spacing": "trailing", "final_abar_one": True}
        return (start or ScheduleConfig()).replace(**end)


OBJECTIVE = Objective()


class DenoiserTask(nn.Module):
    """Learns to predict the noise, or the velocity, in the latents of a data folder.

    parts: codec and text encoder, both frozen. config: describes the network; the objective sets its prediction, and a
    DiT's sample_size must be that of the pictures. views: number of views of each picture. cache: file that keeps the
    latents and tokens. fit: how pictures become square, see `fitted`.
    """

    def __init__(  # noqa: PLR0913
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
        fit: Fit = "crop",
    ) -> None:
        super().__init__()
        self.seed, self.objective = seed, objective
        self.sample_size = size // parts[0].factor
        if isinstance(config, DiTConfig) and config.sample_size != self.sample_size:
            raise ValueError(f"sample_size={config.sample_size} must be {self.sample_size}: pictures of {size} pixels")
        self.edges = EDGES["DiT" if isinstance(config, DiTConfig) else "UNet"]
        self.denoiser = network(config.replace(prediction=objective.prediction))
        initialize(self.denoiser, torch.Generator().manual_seed(seed))
        self.schedule = Schedule(objective.schedule())
        self.parts = parts  # in a tuple: not modules of this one, so neither trained nor saved with it
        self.records, self.held_records = read_records(data), read_records(data, "validation")
        made_of = {
            **fingerprints(data, self.records),
            **{"size": size, "fit": fit, "views": views},
            **{"codec": codec_identity(parts[0]), "text": text_identity(parts[1])},
        }
        self.settings = made_of | {"start": "", **objective.model_dump(), "network": _described(self.denoiser.config)}
        self.notes = caption_notes(data) + fit_notes(data, self.records, fit)
        self.notes += cut_notes(parts[1], [record["text"] for record in self.records])
        self.empty = tokenize(parts[1], [""])
        self.begun, self.previews = False, SHOWN
        self._say: Callable[[str], None] = lambda text: None
        key = key_of(seed=seed, **made_of)
        held = (self.held_records or self.records)[:HELD_OUT]

        def encoded(records: Records, views: int) -> Latents:
            step = HALVINGS * parts[0].factor
            pixels, shapes = load_shaped(data, records, size, fit, step)
            return encode(*parts, records, pixels, views=views, seed=seed, shapes=shapes, say=self._say)

        self._make: Callable[[], tuple[Latents, Latents]] = lambda: (
            Latents(**cached(cache, key, lambda: encoded(self.records, views)._asdict())),
            encoded(held, 1),
        )

    def prepare(self, say: Callable[[str], None]) -> None:
        """Encodes the data or reads the cache. Calling it is optional: the first use of the data does the same."""
        self._say = say
        _ = self._encoded

    @cached_property
    def _encoded(self) -> tuple[Latents, Latents]:
        return self._make()

    @property
    def latents(self) -> Latents:
        return self._encoded[0]

    @property
    def held_out(self) -> Latents:
        return self._encoded[1]

    def start_from(self, model: ModelParts) -> None:
        """Takes the weights and noise schedule of a model that was trained on other pictures or at another size."""
        if model.denoiser.config != self.denoiser.config:
            raise ValueError("the denoiser to start from has another shape or prediction; take the same config")
        self.denoiser.load_state_dict(model.denoiser.state_dict())
        self.schedule = Schedule(self.objective.schedule(model.config.schedule))
        self.settings["start"], self.begun = model.hash[:12], True

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
        captions = [self._caption(int(i), g) for i, g in zip(indices, generators, strict=True)]
        tokens = torch.where(dropped[:, None], self.empty, self._tokens(indices, captions))
        shapes = self.latents.shapes[indices]
        return self._mean_loss(self.latents.x_0[indices], self._contexts(tokens), t, noise, shapes)

    def _mean_loss(self, x_0: Tensor, contexts: Tensor, t: Tensor, noise: Tensor, shapes: Tensor) -> Tensor:
        """Loss of latents that have different shapes, (B, 2): one call of the network for each shape."""
        loss = torch.zeros((), device=self.device)
        for h, w in sorted({tuple(shape) for shape in shapes.tolist()}):
            rows = ((shapes[:, 0] == h) & (shapes[:, 1] == w)).nonzero()[:, 0]
            part = self._loss(x_0[rows, :, :h, :w], contexts[rows.to(contexts.device)], t[rows], noise[rows, :, :h, :w])
            loss = loss + part * (len(rows) / len(shapes))
        return loss

    def _contexts(self, tokens: Tensor) -> Tensor:
        """(B, T) to (B, T, D)"""
        return encode_tokens(self.parts[1].to(self.device), tokens.to(self.device))

    def _caption(self, index: int, generator: Generator) -> str | None:
        """A new caption for a plain view; None for a composed view, which keeps its caption."""
        view, row = divmod(index, len(self.records))
        return caption_of(self.records[row], generator) if view < PLAIN else None

    def _tokens(self, indices: Tensor, captions: list[str | None]) -> Tensor:
        """(B, T)"""
        tokens = self.latents.tokens[indices].clone()
        new = [i for i, caption in enumerate(captions) if caption is not None]
        if new:
            tokens[new] = tokenize(self.parts[1], [caption for caption in captions if caption is not None])
        return tokens

    def _timesteps(self, numbers: Tensor) -> Tensor:
        """(B,) int64, evenly spread over consecutive samples, so that the loss varies less.

        Multiples of the golden ratio modulo 1; Kingma et al. 2021 (Variational Diffusion Models), appendix I.1, spread
        those of a batch for the same reason.
        """
        part = (numbers.double() * GOLDEN).frac()
        if self.objective.timesteps == "logit_normal":
            part = torch.where(numbers % EVEN == 0, part, torch.special.ndtri(part).sigmoid())
        return (part * self.schedule.config.num_train_steps).long()

    def _loss(self, x_0: Tensor, contexts: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        x_0, contexts, t, noise = (tensor.to(self.device) for tensor in (x_0.float(), contexts.float(), t, noise))
        gamma = self.objective.min_snr_gamma
        return diffusion_loss(self.denoiser, self.schedule, x_0, Conditioning(contexts), t=t, noise=noise, gamma=gamma)

    def evaluate(self) -> dict[str, float]:
        """Loss of held-out pairs and of equally many trained pictures, at the same timesteps with the same noise."""
        return {"held_out_loss": self._measured(self.held_out), "trained_loss": self._measured(self.latents)}

    def _measured(self, latents: Latents) -> float:
        count = min(HELD_OUT, len(latents.x_0))
        levels = torch.linspace(0, self.schedule.config.num_train_steps - 1, LEVELS).long()
        noise = normal([sample_generator(self.seed, i) for i in range(count)], tuple(latents.x_0.shape[1:]))
        contexts = self._contexts(latents.tokens[:count])
        x_0, shapes = latents.x_0[:count], latents.shapes[:count]
        losses = [self._mean_loss(x_0, contexts, t.expand(count), noise, shapes).item() for t in levels]
        return sum(losses) / LEVELS

    def preview(self, path: Path) -> None:
        """Draws trained captions in one half, held-out captions in the other."""
        codec, text = self.parts
        held = self.held_records or self.records
        chosen = self.records[:: max(1, len(self.records) // SHOWN * 2)][: SHOWN // 2]
        chosen += held[:: max(1, len(held) // SHOWN * 2)][: SHOWN // 2]
        captions = [str(record["text"]) for record in chosen]
        about = About(sample_size=self.sample_size)
        pipe = Pipeline(text, self.denoiser, codec.to(self.device), self.schedule, about=about)
        text.to(self.device)
        requests = [
            Request(prompt=p, seed=i, steps=PREVIEW_STEPS, guidance_scale=PREVIEW_GUIDANCE)
            for i, p in enumerate(preview_prompt(text, caption) for caption in captions)
        ]
        save_picture(contact_sheet(pipe.generate(requests, progress=False), captions, columns=6), path, force=True)

    def export(self, folder: Path) -> None:
        """Writes the whole model in diffusers' folder layout, in float16, with its checksums."""
        codec, text = self.parts
        config = ModelConfig(
            denoiser=self.denoiser.config,
            schedule=self.schedule.config,
            text=text.config,
            codec=codec.config,
            sample_size=self.sample_size,
        )
        parts = finished(ModelParts(text, self.denoiser, codec, config, folder.name, ""), [])
        save_folder(parts, folder, dtype=torch.float16, max_shard_size=SHARD_BYTES)
        write_sums(folder)


def write_sums(folder: Path) -> None:
    """Writes sha256sums.txt of all weight files; loading checks it."""
    files = sorted(folder.rglob("*.safetensors"))
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}" for file in files]
    (folder / "sha256sums.txt").write_text("\n".join(sums) + "\n")


ZERO = {  # layers that start at zero, so that the network starts as one that predicts nothing
    "UNet": ("conv2", "proj_out", "to_out.0", "ff.net.2", "conv_out"),  # Dhariwal and Nichol 2021
    "DiT": ("adaln_single.linear", "attn2.to_out.0", "proj_out"),  # Peebles and Xie 2023: the gates, not what they gate
}


EDGES = {  # what Muon leaves to AdamW: the first and the last layer, tables that are no matrices
    "UNet": ("conv_in", "conv_out"),
    "DiT": ("pos_embed", "scale_shift_table", "denoiser.proj_out"),
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


def _described(config: DenoiserConfig) -> dict[str, Any]:
    return {"kind": type(config).__name__.removesuffix("Config"), **config.model_dump(mode="json")}
