"""The denoiser task: a UNet or DiT on latents and contexts that codec and text encoder made once.

    images --views--> images, captions --codec, tokenizer--> x_0, tokens   (kept in OUT/cache.safetensors)
    x_0, noise --add_noise(t)--> x_t --network(text(tokens) or text(""))--> v or eps;  loss = its weighted squared error

Every image has several views: plain and mirrored, whose caption is drawn anew for every sample, and composed
(augment.py), whose caption says what was composed. One sample in ten has the empty prompt, which guidance needs (Ho
and Salimans 2022).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sdlite.checkpoints.folder import save_folder
from sdlite.checkpoints.load import load_model
from sdlite.checkpoints.parts import ModelParts, finished, gathered
from sdlite.config import DenoiserConfig, DiTConfig, ScheduleConfig
from sdlite.contracts import Conditioning
from sdlite.diffusion.loss import diffusion_loss
from sdlite.diffusion.schedule import Schedule
from sdlite.files import checksum
from sdlite.images.files import save_picture
from sdlite.images.sheet import contact_sheet
from sdlite.models import network
from sdlite.models.codec import LatentCodec
from sdlite.models.text import TextEncoder
from sdlite.pipeline import About, Pipeline
from sdlite.pipeline.about import device_of
from sdlite.request import Request
from sdlite.training.codec import codec_identity, load_codec
from sdlite.training.datasets.captions import caption_of, cut_notes, tokenize
from sdlite.training.datasets.draws import Generator, normal, sample_generator
from sdlite.training.datasets.folder import Records, caption_notes, fingerprints, read_records
from sdlite.training.datasets.pixels import fit_notes, load_shaped
from sdlite.training.exports import cached, key_of
from sdlite.training.latents import PLAIN, Latents, encode, encode_tokens, preview_prompt
from sdlite.training.networks import EDGES, emoji_dit as emoji_dit, emoji_unet as emoji_unet, initialize
from sdlite.training.options import DenoiserOptions
from sdlite.training.run import SHARD_BYTES
from sdlite.training.state import Task
from sdlite.training.text import load_text, text_identity

SIZE = 256  # pixels of the images that the denoiser is trained on
MAX_SIZE = 512
OBJECTIVE = ("prediction", "timesteps", "min_snr_gamma", "zero_terminal_snr")  # options that say what is learned
HALVINGS = 4  # how much smaller the coarsest level of a UNet is: latents must have sides that are multiples
DROPPED = 0.1  # part of the samples without a caption
HELD_OUT = 256  # images whose loss is measured
EVEN = 8  # one sample in 8 has a uniform timestep, so that the last, where drawing begins, is learned too
GOLDEN = (5**0.5 - 1) / 2
LEVELS = 8  # timesteps, evenly spread, at which it is measured
SHOWN = 24  # images of the preview
PREVIEW_STEPS, PREVIEW_GUIDANCE = 20, 3.0


def schedule_for(options: DenoiserOptions, start: ScheduleConfig | None = None) -> ScheduleConfig:
    """The schedule of the model to start from, with another end if the options ask for one."""
    if start is not None and start.zero_terminal_snr == options.zero_terminal_snr:
        return start
    end = {"zero_terminal_snr": options.zero_terminal_snr, "spacing": "trailing", "final_abar_one": True}
    return (start or ScheduleConfig()).replace(**end)


class DenoiserTask(Task):
    """Learns to predict the noise, or the velocity, in the latents of a data folder.

    parts: codec and text encoder, both frozen. config: describes the network; the options set its prediction, and a
    DiT's sample_size must be that of the images. cache: file that keeps the latents and tokens.
    """

    def __init__(
        self,
        data: Path,
        parts: tuple[LatentCodec, TextEncoder],
        config: DenoiserConfig,
        options: DenoiserOptions,
        *,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        if options.prediction == "epsilon" and options.zero_terminal_snr:
            raise ValueError("prediction=epsilon has no answer to pure noise; use v, or zero_terminal_snr=False")
        size = SIZE if options.size is None else options.size
        self.options, self.sample_size = options, size // parts[0].factor
        if isinstance(config, DiTConfig) and config.sample_size != self.sample_size:
            raise ValueError(f"sample_size={config.sample_size} must be {self.sample_size}: images of {size} pixels")
        kind = "DiT" if isinstance(config, DiTConfig) else "UNet"
        self.edges = EDGES[kind]
        self.denoiser = network(config.replace(prediction=options.prediction))
        initialize(self.denoiser, torch.Generator().manual_seed(options.seed))
        self.schedule = Schedule(schedule_for(options))
        self.parts = parts  # in a tuple: not modules of this one, so neither trained nor saved with it
        self.records, self.held_records = read_records(data), read_records(data, "validation")
        self.size = len(self.records) * options.views
        made_of = {
            **fingerprints(data, self.records),
            **{"size": size, "fit": options.fit, "views": options.views},
            **{"codec": codec_identity(parts[0]), "text": text_identity(parts[1])},
        }
        self.settings = {**made_of, "start": "", **options.model_dump(include=set(OBJECTIVE))}
        described = self.denoiser.config.model_dump(mode="json")
        self.settings["network"] = {"kind": kind, **described}  # after the options, which errors name first
        self.notes = caption_notes(data) + fit_notes(data, self.records, options.fit)
        self.notes += cut_notes(parts[1], [record["text"] for record in self.records])
        self.empty = tokenize(parts[1], [""])
        self.previews = SHOWN
        self._data, self._size, self._cache = data, size, cache
        self._key = key_of(seed=options.seed, **made_of)
        self._say: Callable[[str], None] = lambda text: None

    def prepare(self, say: Callable[[str], None]) -> None:
        """Encodes the data or reads the cache. Calling it is optional: the first use of the data does the same."""
        self._say = say
        _ = self.latents, self.held_out

    @cached_property
    def latents(self) -> Latents:
        made = cached(self._cache, self._key, lambda: self._encoded(self.records, self.options.views)._asdict())
        return Latents(**made)

    @cached_property
    def held_out(self) -> Latents:
        return self._encoded((self.held_records or self.records)[:HELD_OUT], 1)

    def _encoded(self, records: Records, views: int) -> Latents:
        images = load_shaped(self._data, records, self._size, self.options.fit, HALVINGS * self.parts[0].factor)
        return encode(self.parts, records, images, views=views, seed=self.options.seed, say=self._say)

    def start_from(self, model: ModelParts) -> None:
        """Takes the weights and noise schedule of a model that was trained on other images or at another size."""
        if model.denoiser.config != self.denoiser.config:
            raise ValueError("the denoiser to start from has another shape or prediction; take the same config")
        self.denoiser.load_state_dict(model.denoiser.state_dict())
        self.schedule = Schedule(schedule_for(self.options, model.config.schedule))
        self.settings["start"], self.begun = model.hash[:12], True

    def forward(self, indices: Tensor, numbers: Tensor) -> Tensor:
        generators = [sample_generator(self.options.seed, int(n)) for n in numbers]
        t = self._timesteps(numbers)
        dropped = torch.tensor([g.random() < DROPPED for g in generators])
        noise = normal(generators, tuple(self.latents.x_0.shape[1:]))
        captions = [self._caption(int(i), g) for i, g in zip(indices, generators, strict=True)]
        tokens = torch.where(dropped[:, None], self.empty, self._tokens(indices, captions))
        shapes = self.latents.shapes[indices]
        return self._loss(self.latents.x_0[indices], self._contexts(tokens), t, noise, shapes)

    def _loss(self, x_0: Tensor, contexts: Tensor, t: Tensor, noise: Tensor, shapes: Tensor) -> Tensor:
        """Loss of latents that have different shapes, (B, 2): one call of the network for each shape."""
        device, gamma = device_of(self), self.options.min_snr_gamma
        x_0, contexts, t, noise = (tensor.to(device) for tensor in (x_0.float(), contexts.float(), t, noise))
        loss = torch.zeros((), device=device)
        for h, w in sorted({tuple(shape) for shape in shapes.tolist()}):
            rows = ((shapes[:, 0] == h) & (shapes[:, 1] == w)).nonzero()[:, 0].to(device)
            x, eps, conditioning = x_0[rows, :, :h, :w], noise[rows, :, :h, :w], Conditioning(contexts[rows])
            part = diffusion_loss(self.denoiser, self.schedule, x, conditioning, t=t[rows], noise=eps, gamma=gamma)
            loss = loss + part * (len(rows) / len(shapes))
        return loss

    def _contexts(self, tokens: Tensor) -> Tensor:
        """(B, T) to (B, T, D)"""
        return encode_tokens(self.parts[1].to(device_of(self)), tokens.to(device_of(self)))

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
        if self.options.timesteps == "logit_normal":
            part = torch.where(numbers % EVEN == 0, part, torch.special.ndtri(part).sigmoid())
        return (part * self.schedule.config.num_train_steps).long()

    def evaluate(self) -> dict[str, float]:
        """Loss of held-out pairs and of equally many trained images, at the same timesteps with the same noise."""
        return {"held_out_loss": self._measured(self.held_out), "trained_loss": self._measured(self.latents)}

    def _measured(self, latents: Latents) -> float:
        count = min(HELD_OUT, len(latents.x_0))
        levels = torch.linspace(0, self.schedule.config.num_train_steps - 1, LEVELS).long()
        noise = normal([sample_generator(self.options.seed, i) for i in range(count)], tuple(latents.x_0.shape[1:]))
        contexts = self._contexts(latents.tokens[:count])
        x_0, shapes = latents.x_0[:count], latents.shapes[:count]
        losses = [self._loss(x_0, contexts, t.expand(count), noise, shapes).item() for t in levels]
        return sum(losses) / LEVELS

    def preview(self, path: Path) -> None:
        """Draws trained captions in one half, held-out captions in the other."""
        codec, text = self.parts
        held = self.held_records or self.records
        chosen = self.records[:: max(1, len(self.records) // SHOWN * 2)][: SHOWN // 2]
        chosen += held[:: max(1, len(held) // SHOWN * 2)][: SHOWN // 2]
        captions = [str(record["text"]) for record in chosen]
        about = About(sample_size=self.sample_size)
        pipe = Pipeline(text, self.denoiser, codec.to(device_of(self)), self.schedule, about=about)
        text.to(device_of(self))
        requests = [
            Request(prompt=p, seed=i, steps=PREVIEW_STEPS, guidance_scale=PREVIEW_GUIDANCE)
            for i, p in enumerate(preview_prompt(text, caption) for caption in captions)
        ]
        save_picture(contact_sheet(pipe.generate(requests, progress=False), captions, columns=6), path, force=True)

    def export(self, folder: Path) -> None:
        """Writes the whole model in diffusers' folder layout, in float16, with its checksums."""
        codec, text = self.parts
        parts = gathered(text, self.denoiser, codec, self.schedule.config, self.sample_size, ())
        parts = finished(replace(parts, name=folder.name), [])
        save_folder(parts, folder, dtype=torch.float16, max_shard_size=SHARD_BYTES)
        files = sorted(folder.rglob("*.safetensors"))
        sums = [f"{checksum(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
        (folder / "sha256sums.txt").write_text("".join(sums))


def make_task(data: Path, out: Path, options: DenoiserOptions) -> DenoiserTask:
    """The task of `sdlite train denoiser`, with a new network or with that of the model to start from."""
    start = None if options.start is None else load_model(options.start, allow_links=options.allow_links or ())
    codec, text = _parts(options, start)
    widths = codec.latent_channels, text.config.hidden_size
    size = _size(options, codec.factor, start)
    config: DenoiserConfig
    if start is not None:
        config = start.denoiser.config
        _check_start(options, config, *widths)
        theirs = {"prediction": config.prediction, "zero_terminal_snr": start.config.schedule.zero_terminal_snr}
        given = options.model_fields_set
        options = options.replace(size=size, **{name: theirs[name] for name in theirs.keys() - given})
    elif options.arch == "dit":
        config = emoji_dit(*widths, sample_size=size // codec.factor)
    else:
        config = emoji_unet(*widths)
    cache = out / "cache.safetensors"
    task = DenoiserTask(data, (codec, text), config, options.replace(size=size), cache=cache)
    if start is not None:
        task.start_from(start)
    return task


def _parts(options: DenoiserOptions, start: ModelParts | None) -> tuple[LatentCodec, TextEncoder]:
    codec, text = (None, None) if start is None else (start.codec, start.text)
    if options.codec is not None:
        codec = load_codec(options.codec)
    if options.text is not None:
        text = load_text(options.text)
    if codec is None or text is None:
        name = "codec" if codec is None else "text"
        raise ValueError(
            f"the denoiser needs --{name}: the folder OUT/export that `sdlite train {name}` wrote; or --from: a model "
            "that has all"
        )
    return codec, text


def _size(options: DenoiserOptions, factor: int, start: ModelParts | None) -> int:
    """Side of the images in pixels: the one that was asked for, the model's shorter side, or SIZE."""
    size = options.size
    if size is None:
        cells = SIZE // factor if start is None else start.config.sample_size
        size = factor * (cells if isinstance(cells, int) else min(cells))
    if size % (HALVINGS * factor) or not 0 < size <= MAX_SIZE:
        raise ValueError(f"size={size} must be a multiple of {HALVINGS * factor} pixels, up to {MAX_SIZE}")
    return size


def _check_start(options: DenoiserOptions, config: DenoiserConfig, channels: int, width: int) -> None:
    """Raises ValueError if the model's denoiser cannot be trained further with this codec and text encoder."""
    name = options.start
    if "arch" in options.model_fields_set and (options.arch == "dit") != isinstance(config, DiTConfig):
        raise ValueError(f"--arch {options.arch} is not what {name} holds; leave it out")
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"{name} is an inpainting model, whose denoiser also reads a mask ({config.in_channels} channels); "
            "training goes on from models that draw from text alone"
        )
    if config.in_channels != channels:
        raise ValueError(f"{name} has latents of {config.in_channels} channels and --codec has {channels}")
    if config.context_dim != width:
        raise ValueError(f"{name} reads text of width {config.context_dim} and --text gives {width}")
