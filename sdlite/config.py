"""Records: what a model is made of (`ModelConfig` and its parts) and which one to load (`LoadOptions`).

All are frozen and refuse unknown fields, and every error is one line that names the field, the value and the rule.
Configs name choices of architecture, never code paths. The presets `sd15`, `sd21`, `tiny`, `tiny_dit` are functions.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Prediction = Literal["epsilon", "v", "sample"]
DEVICES = ("auto", "cpu", "cuda", "mps")
UNTRAINED_NOTE = "this model is untrained: its weights are random, and so are its images"
MAX_SIDE = 4096  # pixels; beyond it one float32 image of activations no longer fits a common machine
Size = Annotated[int, Field(ge=8, le=MAX_SIDE)]
Cells = Annotated[int, Field(ge=1, le=1024)]  # of a latent, along one side
Sides = Cells | tuple[Cells, Cells]  # of a square, or (height, width)
Fraction = Annotated[float, Field(ge=0, le=1)]
Channels = Annotated[int, Field(ge=1, le=8192)]
Stages = Annotated[tuple[Channels, ...], Field(min_length=1, max_length=8)]
Blocks = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=8)]  # TAESD has 3
Place = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
ELSEWHERE = {  # names of fields in diffusers and Automatic1111
    **dict.fromkeys(("num_images_per_prompt", "n_iter"), "num_images"),
    **dict.fromkeys(("sampler", "sampler_name", "scheduler"), "solver"),
    "num_inference_steps": "steps",
    "generator": "seed",
    "cfg_scale": "guidance_scale",
    "mask_image": "mask",
    "denoising_strength": "strength",
}


def _one_line(error: ValidationError, fields: list[str]) -> str:
    """First fault of a validation error as `field=value: rule`, with the nearest known field for an unknown one."""
    fault = error.errors()[0]
    name = f"{'.'.join(map(str, fault['loc'])):.80}"
    if fault["type"] == "extra_forbidden":
        near = [ELSEWHERE[name]] if name in ELSEWHERE else get_close_matches(name, fields, 1)
        advice = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
        return f"unknown field {name!r:.80}; {advice}"
    if fault["type"] == "missing":
        return f"{name} is required"
    rule = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    rule = rule.replace("String should have at most", "at most")
    return rule if not name else f"{name}={fault['input']!r:.80} must be {rule}"


def _check_number(name: str, given: Any, read: Any) -> None:
    """Raises ValueError where pydantic read a number that nobody wrote as one: true as 1, "1_0" as 10."""
    values, numbers = (x if isinstance(x, list | tuple) else [x] for x in (given, read))
    for value, number in zip(values, numbers, strict=False):
        odd = isinstance(value, bool) or (isinstance(value, str) and "_" in value)
        if odd and isinstance(number, int | float) and not isinstance(number, bool):
            raise ValueError(f"{name}={given!r:.80} must be a number, not {value!r:.80}")


def check_device(name: str) -> None:
    """Raises ValueError for a device of no known kind, such as "gpu". PyTorch knows whether this machine has it."""
    if name not in DEVICES and name.partition(":")[0] not in DEVICES[1:]:
        raise ValueError(f"device={name!r} must be one of {', '.join(DEVICES)}")


class Record(BaseModel):
    """Frozen, closed pydantic model whose errors are one-line ValueErrors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ValueError(_one_line(error, list(type(self).model_fields))) from None
        for name, value in fields.items():
            _check_number(name, value, getattr(self, name))

    def replace(self, /, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)


class LoadOptions(Record):
    """Which model to load, and how. The command line, batches, evaluation and training all take these options.

    model: folder, single file, hub id or preset; None is the model that ships. device: "auto" takes a GPU if there is
    one. dtype: of text encoder and denoiser; "auto" is float32 on a CPU and float16 on a GPU. prediction: overrides
    what the files say or sdlite guesses. vae: file, folder, hub id or "tiny" (TAESD) of a VAE to use instead of the
    model's. variant: which weights of a folder, such as "fp16". allow_links: links in a model's folder may lead into
    these folders. Paths become text, so that a record can be written as JSON.
    """

    model: Place | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    prediction: Prediction | None = None
    vae: Place | None = None
    variant: str | None = None
    allow_links: tuple[Place, ...] = ()

    def file_keywords(self) -> dict[str, Any]:
        """Keywords of `load_model` and `convert`, which leave weights on the CPU in float32."""
        return {name: getattr(self, name) for name in ("prediction", "vae", "variant", "allow_links")}

    def keywords(self) -> dict[str, Any]:
        """Keywords of `Pipeline.load`: `Pipeline.load(options.model, **options.keywords())`."""
        return {"device": self.device, "dtype": self.dtype, **self.file_keywords()}


class UNetConfig(Record):
    """The conditional UNet (Rombach et al. 2022), in the terms of diffusers' UNet2DConditionModel.

    Tuples have one entry per stage, finest to coarsest. attention_stages: which have cross-attention.
    num_heads: heads, not their width (diffusers calls this attention_head_dim). context_dim: width of text features.
    transformer_depth: transformer blocks in each attention, or one number for all stages; the middle has the last's.
    """

    in_channels: Channels = 4
    out_channels: Channels = 4
    block_out_channels: Stages
    layers_per_block: int = Field(2, ge=1, le=8)
    attention_stages: tuple[bool, ...]
    num_heads: Stages
    context_dim: Channels
    num_groups: Channels = 32
    use_linear_projection: bool = False
    transformer_depth: tuple[Annotated[int, Field(ge=0, le=32)], ...] = (1,)
    prediction: Prediction = "epsilon"

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        channels, stages = self.block_out_channels, len(self.block_out_channels)
        lengths = {"attention_stages": {stages}, "num_heads": {stages}, "transformer_depth": {1, stages}}
        for name, possible in lengths.items():
            if len(getattr(self, name)) not in possible:
                raise ValueError(f"{name} must have one entry per stage, {stages}, like block_out_channels")
        if not any([self.depth(-1), *(has and self.depth(i) for i, has in enumerate(self.attention_stages))]):
            raise ValueError(f"transformer_depth={self.transformer_depth} leaves no attention to the prompt")
        for width, heads in zip(channels, self.num_heads, strict=True):
            if width % heads or width % self.num_groups:
                multiple = f"must be a multiple of its num_heads={heads} and of num_groups={self.num_groups}"
                raise ValueError(f"block_out_channels={channels}: {width} {multiple}")
        return self

    def depth(self, stage: int) -> int:
        """Number of transformer blocks in each attention of a stage."""
        return self.transformer_depth[stage if len(self.transformer_depth) > 1 else 0]


class DiTConfig(Record):
    """The Diffusion Transformer (Peebles and Xie 2023; Chen et al. 2023), in the terms of PixArtTransformer2DModel.

    patch_size: latent cells along each side of a token. width: of a token. depth: number of blocks. context_dim: width
    of text features. sample_size: side in latent cells whose positions count in single tokens; at another size they
    are stretched to the same span.
    """

    in_channels: Channels = 4
    out_channels: Channels = 4
    patch_size: int = Field(2, ge=1, le=64)
    width: Channels
    depth: int = Field(ge=1, le=128)
    num_heads: Channels
    context_dim: Channels
    sample_size: int = Field(64, ge=1, le=1024)
    prediction: Prediction = "epsilon"

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.width % self.num_heads or self.width % 4:
            multiple = f"must be a multiple of num_heads={self.num_heads} and of 4"
            raise ValueError(f"width={self.width} {multiple}, for a sine and a cosine of row and column")
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size={self.sample_size} must be a multiple of patch_size={self.patch_size}")
        return self

    @property
    def position_shrink(self) -> int:
        """Divides positions, so that models of more than 64 latent cells span what smaller ones do (PixArt-alpha)."""
        return max(self.sample_size // 64, 1)


DenoiserConfig = UNetConfig | DiTConfig


class ScheduleConfig(Record):
    """Noise schedule and timestep grid; the defaults are Stable Diffusion's.

    final_abar_one: the last step ends at abar 1, a noise-free image, and not at abar of timestep 0.
    spacing: None leaves the grid to the solver, as diffusers does for a scheduler config without timestep_spacing.
    zero_terminal_snr: rescaled so that the last timestep is pure noise (Lin et al. 2023, algorithm 1).
    """

    num_train_steps: int = Field(1000, ge=2, le=10_000)
    beta_start: float = Field(0.00085, gt=0, lt=1)
    beta_end: float = Field(0.012, gt=0, lt=1)
    beta_schedule: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    steps_offset: int = Field(1, ge=0, le=100)
    final_abar_one: bool = False
    spacing: Literal["leading", "trailing", "linspace"] | None = None
    zero_terminal_snr: bool = False


class TextConfig(Record):
    """CLIP text encoder (Radford et al. 2021), in the terms of transformers' CLIPTextConfig."""

    vocab_size: int = Field(49_408, ge=8, le=1_000_000)
    hidden_size: Channels
    intermediate_size: int = Field(ge=1, le=65_536)
    num_hidden_layers: int = Field(ge=1, le=48)
    num_attention_heads: int = Field(ge=1, le=128)
    max_position_embeddings: int = Field(77, ge=4, le=1024)
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = Field(1e-5, gt=0, lt=1)
    bos_token_id: int = Field(49_406, ge=0)
    eos_token_id: int = Field(49_407, ge=0)
    pad_token_id: int = Field(49_407, ge=0)


class AutoencoderKLConfig(Record):
    """Convolutional VAE (Rombach et al. 2022, appendix G), in the terms of diffusers' AutoencoderKL."""

    in_channels: Channels = 3
    out_channels: Channels = 3
    block_out_channels: Stages
    layers_per_block: int = Field(2, ge=1, le=8)
    latent_channels: Channels = 4
    norm_num_groups: Channels = 32
    scaling_factor: float = Field(0.18215, gt=0)
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


class AutoencoderTinyConfig(Record):
    """TAESD, the distilled small autoencoder, in the terms of diffusers' AutoencoderTiny."""

    in_channels: Channels = 3
    out_channels: Channels = 3
    encoder_block_out_channels: Stages = (64, 64, 64, 64)
    decoder_block_out_channels: Stages = (64, 64, 64, 64)
    latent_channels: Channels = 4
    upsampling_scaling_factor: Literal[2] = 2
    num_encoder_blocks: Blocks = (1, 3, 3, 3)
    num_decoder_blocks: Blocks = (3, 3, 3, 1)
    latent_magnitude: int = Field(3, ge=1)
    latent_shift: float = 0.5
    scaling_factor: float = Field(1.0, gt=0)
    shift_factor: float | None = 0.0

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each side."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)


CodecConfig = AutoencoderKLConfig | AutoencoderTinyConfig


class ModelConfig(Record):
    """A whole model. sample_size: default size of an image in latent cells, the side or (height, width)."""

    denoiser: DenoiserConfig
    schedule: ScheduleConfig
    text: TextConfig
    codec: CodecConfig
    sample_size: Sides = 64

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if isinstance(self.denoiser, DiTConfig) and self.denoiser.sample_size != self.sample_size:
            raise ValueError(f"sample_size={self.sample_size} must be the DiT's, {self.denoiser.sample_size}")
        return self


def sd15(in_channels: int = 4, prediction: Prediction = "epsilon") -> ModelConfig:
    """Stable Diffusion 1.x; in_channels=9 is its inpainting model (latents, mask, masked image)."""
    stages = {"block_out_channels": (320, 640, 1280, 1280), "attention_stages": (True, True, True, False)}
    return ModelConfig(
        denoiser=UNetConfig(
            **stages, num_heads=(8, 8, 8, 8), context_dim=768, in_channels=in_channels, prediction=prediction
        ),
        schedule=ScheduleConfig(),
        text=TextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        codec=AutoencoderKLConfig(block_out_channels=(128, 256, 512, 512)),
    )


def sd21(in_channels: int = 4, prediction: Prediction = "v") -> ModelConfig:
    """Stable Diffusion 2.x; "v" is the 768-pixel model, "epsilon" the 512-pixel base.

    The text encoder has 23 layers: the last of OpenCLIP ViT-H's 24 is not used.
    """
    base = sd15(in_channels, prediction)
    unet = base.denoiser.replace(num_heads=(5, 10, 20, 20), context_dim=1024, use_linear_projection=True)
    text = TextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
    text = text.replace(hidden_act="gelu", pad_token_id=0)
    return base.replace(denoiser=unet, text=text, sample_size=96 if prediction == "v" else 64)


def tiny(in_channels: int = 4, prediction: Prediction = "epsilon") -> ModelConfig:
    """Every part of SD1 at toy size, for tests and for trying commands: draws 64-pixel images in a blink."""
    unet = UNetConfig(block_out_channels=(32, 64), attention_stages=(True, False), num_heads=(2, 4), context_dim=32)
    return ModelConfig(
        denoiser=unet.replace(in_channels=in_channels, layers_per_block=1, num_groups=8, prediction=prediction),
        schedule=ScheduleConfig(),
        text=TextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
        codec=AutoencoderKLConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4),
        sample_size=8,
    )


def tiny_dit(in_channels: int = 4, prediction: Prediction = "epsilon") -> ModelConfig:
    """`tiny` with a Transformer in the UNet's place."""
    dit = DiTConfig(width=48, depth=2, num_heads=3, context_dim=32, sample_size=8)
    return tiny().replace(denoiser=dit.replace(in_channels=in_channels, prediction=prediction))
