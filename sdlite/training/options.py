"""The options of training, one record per stage: the only place where an option is declared.

    command line --> record --> settings in OUT/config.json, checks, notes in OUT/log.jsonl

A field with a description is a flag of `sdlite train`. All lengths are in samples. This module does not load torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sdlite.config import Place, Record
from sdlite.request import GuidanceScale, Steps

Stage = Literal["codec", "text", "denoiser", "segmentation"]
Samples = Annotated[int, Field(ge=0)]
Length = Annotated[int, Field(ge=1)]
BatchSize = Annotated[int, Field(ge=1, le=65_536, description="Samples in a batch, per process.")]
Rate = Annotated[float, Field(gt=0, le=1, description="Highest learning rate.")]
Optimizer = Annotated[Literal["adamw", "muon"], Field(description="How the weights are updated.")]
ShowSamples = Annotated[Samples, Field(description="Samples between exports with previews; 0: never.")]
FIT = """What to do with images that are not square: crop cuts off the ends, pad adds white bars, bucket (denoiser only)
uses the nearest of a few shapes."""
Square = Annotated[Literal["crop", "pad"], Field(description=FIT)]


class Call(Record):
    """What one call does. A resumed run may change all of it.

    minutes: of this call. report_every: samples between lines of the log. plot: draw curves.png and progress.html with
    every export. An export comes with figures on held-out data and a preview.
    """

    minutes: float | None = Field(None, gt=0, description="Time budget of this call.")
    report_every: Length = 2_000
    save_minutes: float = Field(4.0, ge=0, description="Minutes between checkpoints; 0: only at the end.")
    show_minutes: float = Field(20.0, ge=0, description="Minutes between exports with previews; 0: only at the end.")
    show_samples: ShowSamples = 0
    plot: bool = Field(False, description="Draw OUTPUT/curves.png, and OUTPUT/progress.html, a film of the previews.")
    new_data: bool = Field(False, description="Resume the run even if its data have changed.")


class Pace(Record):
    """How the weights are updated. A resumed run may change all of it, and the log notes each change.

    samples: length of the whole run. warmup: samples until the rate is `lr`. half_life: of the average of the weights.
    clip: largest norm of a gradient. precision: of autocast.
    """

    batch_size: BatchSize = 32
    lr: Rate = 1e-3
    warmup: Samples = 3_000
    decay: Literal["constant", "cosine"] = Field(
        "constant", description="cosine lets the rate fall to zero at --samples."
    )
    samples: int | None = Field(None, ge=1, description="Length of the whole run in samples.")
    weight_decay: float = Field(0.01, ge=0, le=1)
    half_life: Length = 20_000
    clip: float = Field(1.0, gt=0)
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="Precision of autocast on a GPU.")


class TrainConfig(Call, Pace):
    """How to train. Every stage has these options. A resumed run must have the same optimizer and seed.

    optimizer: "muon" uses Muon with rate lr for all matrices and kernels except the task's `edges`, and AdamW for the
    rest.
    """

    optimizer: Optimizer = "adamw"
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of first weights, order and noise.")

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.decay == "cosine" and self.samples is None:
            raise ValueError("decay=cosine needs samples, the length of the whole run, to fall to zero at")
        return self

    def settings(self) -> dict[str, Any]:
        """The fields that every stage has, as in config.json. A task adds its own."""
        return self.model_dump(mode="json", include=set(TrainConfig.model_fields))


class CodecOptions(TrainConfig):
    """cropped: number of samples, the first ones, that are crops of half the side."""

    batch_size: BatchSize = 12
    lr: Rate = 2e-3
    warmup: Samples = 1_200
    half_life: Length = 6_000
    size: int = Field(256, ge=1, description="Side of the images in pixels.")
    fit: Square = "crop"
    codec: Path | None = Field(None, description="Folder of the codec whose decoder is trained further.")
    teacher: Path | None = Field(None, description="Folder of a codec for images of half the size, to learn from.")
    adversarial: bool = Field(False, description="With --codec: sharpen its decoder's edges.")
    cropped: Samples = 28_800


class TextOptions(TrainConfig):
    """phrases: most phrases that are learned from the teacher."""

    lr: Rate = 5e-4
    warmup: Samples = 3_200
    half_life: Length = 10_000
    fit: Square = "crop"
    teacher: Path | None = Field(None, description="Folder of a sentence encoder, to learn from.")
    phrases: Length = 20_000


class DenoiserOptions(TrainConfig):
    """The card of emoji-128 compares the choices of what is learned.

    start: its codec, text encoder, size, prediction and zero_terminal_snr are the defaults.
    timesteps: "logit_normal" draws more of the middle ones (Esser et al. 2024, section 3.1: location 0, scale 1).
    min_snr_gamma: see `min_snr_weight`; None (or 0) weighs all timesteps alike. zero_terminal_snr: makes the last
    timestep pure noise, so that dark and light images start from the same noise (Lin et al. 2023). views: number of
    views of each image, encoded once.
    """

    lr: Rate = 3e-3
    optimizer: Optimizer = "muon"
    warmup: Samples = 1_600
    show_samples: ShowSamples = 50_000
    start: Place | None = Field(None, description="The model to train on, such as emoji-128.")
    allow_links: tuple[Place, ...] | None = Field(None, description="Allow links in its folder to lead into ROOT.")
    codec: Path | None = Field(None, description="Folder of the codec stage.")
    text: Path | None = Field(None, description="Folder of the text stage.")
    arch: Literal["unet", "dit"] = Field("unet", description="unet or dit.")
    size: int | None = Field(None, description="Side of the images in pixels.")
    fit: Literal["crop", "pad", "bucket"] = Field("crop", description=FIT)
    prediction: Literal["epsilon", "v"] = Field("v", description="What it predicts.")
    timesteps: Literal["uniform", "logit_normal"] = Field(
        "logit_normal", description="Which noise levels it sees most."
    )
    min_snr_gamma: float | None = Field(
        5.0, ge=0, description="Limits the weight of low noise levels in the loss; 0: all levels count the same."
    )
    zero_terminal_snr: bool = Field(True, description="The last noise level is pure noise.")
    views: Length = 4

    @field_validator("min_snr_gamma")
    @classmethod
    def _no_limit(cls, gamma: float | None) -> float | None:
        return None if gamma == 0 else gamma

    @model_validator(mode="after")
    def _links_of_a_model(self) -> Self:
        if self.allow_links is not None and self.start is None:
            raise ValueError("--allow-links is for --from; leave it out")
        return self


class SegmentationOptions(TrainConfig):
    """terms: parts of the loss and their weights, see `sdlite.segmentation.losses.combined`."""

    batch_size: BatchSize = 8
    lr: Rate = 2e-3
    warmup: Samples = 160
    half_life: Length = 400
    report_every: Length = 400
    arch: Literal["unet", "fcn"] = Field("unet", description="unet or fcn.")
    class_weights: tuple[float, ...] | None = Field(None, description="How much each class counts.")
    terms: Mapping[str, float] = {"cross_entropy": 1.0, "dice": 1.0}

    @field_validator("class_weights", mode="before")
    @classmethod
    def _listed(cls, weights: Any) -> Any:
        try:
            return [float(part) for part in weights.split(",")] if isinstance(weights, str) else weights
        except ValueError:
            raise ValueError("numbers with commas between them, one per class") from None


class EvaluationOptions(Record):
    """Of `sdlite evaluate`. minutes: to train the judge. steps, guidance_scale: of every image that is drawn."""

    images: int = Field(100, ge=8, le=10_000, description="Number of held-out pairs to draw.")
    minutes: float = Field(10.0, gt=0, description="Time to train the judge, if OUTPUT has none.")
    steps: Steps = 20
    guidance_scale: GuidanceScale = 5.0


OPTIONS: dict[Stage, type[TrainConfig]] = {
    "codec": CodecOptions,
    "text": TextOptions,
    "denoiser": DenoiserOptions,
    "segmentation": SegmentationOptions,
}
INTERNAL = {  # no flags
    name for record in OPTIONS.values() for name, field in record.model_fields.items() if field.description is None
}


def options_of(stage: Stage, fields: Mapping[str, Any]) -> TrainConfig:
    """The record of a stage; fields that are None have its default. Raises ValueError for options of other stages."""
    given = {name: value for name, value in fields.items() if value is not None}
    stages = {name: [other for other in OPTIONS if name in OPTIONS[other].model_fields] for name in given}
    if misplaced := [name for name in given if stages[name] and stage not in stages[name]]:
        flags = {name: "--from" if name == "start" else f"--{name.replace('_', '-')}" for name in misplaced}
        uses = ", ".join(f"{flag} is for {' and '.join(stages[name])}" for name, flag in flags.items())
        raise ValueError(f"{uses}; leave it out")
    return OPTIONS[stage](**given)
