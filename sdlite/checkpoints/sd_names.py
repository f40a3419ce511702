"""Maps the names of our modules to those of the original Stable Diffusion files (CompVis, Stability AI).

    model.diffusion_model.input_blocks.1.0.in_layers.0.weight     down_blocks.0.resnets.0.norm1.weight
    first_stage_model.decoder.up.3.block.0.conv1.weight           decoder.up_blocks.0.resnets.0.conv1.weight
    cond_stage_model.transformer.text_model.<name>                <name>, SD1: CLIP as transformers has it
    cond_stage_model.model.transformer.resblocks.0.ln_1.weight    encoder.layers.0.layer_norm1.weight, SD2: OpenCLIP

The map is data and pure functions from our names. To read a file, it is inverted for the names that the config needs.
Sources: CompVis/stable-diffusion ldm/modules/diffusionmodules/{openaimodel,model}.py and ldm/modules/ema.py,
Stability-AI/stablediffusion ldm/modules/encoders/modules.py, mlfoundations/open_clip transformer.py.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sdlite.checkpoints.places import CheckpointError
from sdlite.config import AutoencoderTinyConfig, DenoiserConfig, ModelConfig, UNetConfig

Part = Literal["text", "denoiser", "codec"]

UNET = "model.diffusion_model."
CODEC = "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model."
EMA = "model_ema."
MIN_EMA_KEYS = 100  # fewer are the counters of training, not weights

# Other spellings of the prefixes: later Stability files (sgm), NovelAI's, and files with a VAE from elsewhere.
SPELLINGS = {
    r"^conditioner\.embedders\.0\.(?=model\.|transformer\.)": "cond_stage_model.",
    r"^cond_stage_model\.transformer\.(?=(embeddings|encoder|final_layer_norm)\.)": CLIP,
    r"^vae\.(?=(encoder|decoder|quant_conv|post_quant_conv|loss)\.)": CODEC,
}
# The codec's attention: under diffusers' names also in original files that a converter renamed in part.
CODEC_LEAF = re.compile(rf"({re.escape(CODEC)}(?:encoder|decoder)\.mid\.attn_1)\.(.+)\.(weight|bias)")
CODEC_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15
OLD_LEAF = re.compile(rf"(?<=\.attentions\.0\.)({'|'.join(OLD_ATTENTION)})(?=\.\w+$)")

# Regular expressions in our names and what the original code has there, applied in this order.
UNET_RULES = {
    r"^conv_in\.": "input_blocks.0.0.",
    r"^time_embedding\.linear_1": "time_embed.0",
    r"^time_embedding\.linear_2": "time_embed.2",
    r"^conv_norm_out": "out.0",
    r"^conv_out": "out.2",
    r"(resnets\.\d+)\.norm1": r"\1.in_layers.0",
    r"(resnets\.\d+)\.conv1": r"\1.in_layers.2",
    r"(resnets\.\d+)\.time_emb_proj": r"\1.emb_layers.1",
    r"(resnets\.\d+)\.norm2": r"\1.out_layers.0",
    r"(resnets\.\d+)\.conv2": r"\1.out_layers.3",
    r"(resnets\.\d+)\.conv_shortcut": r"\1.skip_connection",
    r"mid_block\.resnets\.0": "middle_block.0",
    r"mid_block\.attentions\.0": "middle_block.1",
    r"mid_block\.resnets\.1": "middle_block.2",
    r"downsamplers\.0\.conv": "downsamplers.0.op",
}
UNET_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)")
CODEC_RULES = {
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1",
    r"resnets": "block",
    r"samplers\.0": "sample",
    r"down_blocks": "down",
    **{rf"(attn_1)\.{re.escape(ours)}\.": rf"\1.{theirs}." for ours, theirs in CODEC_ATTENTION.items()},
}
OPEN_CLIP_RULES = {
    r"^embeddings\.token_embedding": "token_embedding",
    r"^embeddings\.position_embedding\.weight": "positional_embedding",
    r"^final_layer_norm": "ln_final",
    r"^encoder\.layers": "transformer.resblocks",
    r"layer_norm(1|2)": r"ln_\1",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
    r"self_attn\.out_proj": "attn.out_proj",
    r"self_attn\.[qkv]_proj\.": "attn.in_proj_",
}

MARKERS = ("v_pred", "ztsnr")
UNUSED = f"""
    betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
    posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 logvar lvlb_weights scale_factor
    {" ".join(MARKERS)} denoiser.sigmas global_step cond_stage_model.logit_scale {CLIP}embeddings.position_ids
    {OPEN_CLIP}attn_mask {OPEN_CLIP}logit_scale {OPEN_CLIP}text_projection
    cond_stage_model.transformer.text_projection.weight
""".split()
UNUSED_PREFIXES = (EMA, "loss.", f"{CODEC}loss.", f"{CODEC}model_ema.")


def canonical(key: str) -> str:
    """The key in this module's spelling."""
    key = _renamed(key, SPELLINGS)
    if leaf := CODEC_LEAF.fullmatch(key):
        module = OLD_ATTENTION.get(leaf[2], leaf[2])
        return f"{leaf[1]}.{CODEC_ATTENTION.get(module, module)}.{leaf[3]}"
    return key


def modern_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A codec's weights in diffusers' layout, with the attention's names as they are since diffusers 0.15."""
    return {OLD_LEAF.sub(lambda old: OLD_ATTENTION[old[0]], name): value for name, value in weights.items()}


def is_unused(key: str, text_layers: int | None = None) -> bool:
    """Whether a canonical key is known and not needed for drawing.

    text_layers: those of the text encoder; SD2 does not use OpenCLIP's last layer, which comes after them.
    """
    return key in UNUSED or key.startswith((*UNUSED_PREFIXES, f"{OPEN_CLIP}transformer.resblocks.{text_layers}."))


def ema_key(key: str) -> str:
    """Where a UNet weight's moving average is: LitEma drops the dots, which buffers may not have."""
    return EMA + "".join(key.split(".")[1:])


def original_names(
    names: Mapping[Part, Iterable[str]], denoiser: DenoiserConfig | None = None, open_clip: bool = False
) -> dict[str, list[str]]:
    """Original key -> our names, as part.name; several where OpenCLIP stacks Q, K and V.

    names: those of each part that is wanted. denoiser: its config, if it is among them.
    """
    keys: dict[str, list[str]] = {}
    for name in names.get("denoiser", ()):
        assert isinstance(denoiser, UNetConfig), "check_layout refuses a DiT"
        keys[UNET + unet_key(name, denoiser)] = [f"denoiser.{name}"]
    codec = list(names.get("codec", ()))
    stages = len({name.split(".")[2] for name in codec if name.startswith("decoder.up_blocks.")})
    for name in codec:
        keys[CODEC + codec_key(name, stages)] = [f"codec.{name}"]
    for name in sorted(names.get("text", ()), key=_stack_order):
        key = OPEN_CLIP + _renamed(name, OPEN_CLIP_RULES) if open_clip else CLIP + name
        keys.setdefault(key, []).append(f"text.{name}")
    return keys


def check_layout(config: ModelConfig, has_codec: bool, where: str, verb: str) -> None:
    """Raises CheckpointError for parts that the layout has no place for. has_codec: the codec is in the file."""
    wrong = "a DiT" if not isinstance(config.denoiser, UNetConfig) else None
    if has_codec and isinstance(config.codec, AutoencoderTinyConfig):
        wrong = "an AutoencoderTiny"
    if wrong is not None:
        raise CheckpointError(f"{where}the original layout has no place for {wrong}; {verb} a folder")


def _stack_order(name: str) -> int:
    """Q before K before V, the order of their rows in OpenCLIP's matrix."""
    return max("qkv".find(name.partition("self_attn.")[2][:1]), 0)


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


def unet_key(name: str, config: UNetConfig) -> str:
    """down_blocks.0.resnets.1.norm1.weight -> input_blocks.2.0.in_layers.0.weight

    The original code counts blocks over all stages. A stage has layers_per_block of them and a downsampler on the way
    down, one more and an upsampler within the last on the way up.
    """

    def place(match: re.Match[str]) -> str:
        stage, kind, index = int(match[2]), match[3], int(match[4])
        first = stage * (config.layers_per_block + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + config.layers_per_block + 1}.0"
        if kind == "upsamplers":
            return f"output_blocks.{first + config.layers_per_block}.{2 if config.attention_stages[-1 - stage] else 1}"
        block = f"input_blocks.{first + index + 1}" if match[1] == "down" else f"output_blocks.{first + index}"
        return f"{block}.{0 if kind == 'resnets' else 1}"

    return UNET_BLOCK.sub(place, _renamed(name, UNET_RULES))


def codec_key(name: str, stages: int) -> str:
    """decoder.up_blocks.0.resnets.1.conv1.weight -> decoder.up.3.block.1.conv1.weight"""
    renamed = _renamed(name, CODEC_RULES)
    return re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{stages - 1 - int(match[1])}", renamed)


def original_shape(key: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Shape that the tensors of one key have together in the file."""
    first, *rest = shapes[0]
    return with_kernel(key, (first * len(shapes), *rest))


def with_kernel(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Adds the 1x1 kernel of the codec's attention: most files store it as convolutions."""
    return (*shape, 1, 1) if key.startswith(CODEC) and ".attn_1." in key and len(shape) == 2 else shape


def split(tensor: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Turns the file's tensor into ours: splits stacked Q, K and V, makes the codec's 1x1 convolutions matrices."""
    return [part.reshape(shape) for part, shape in zip(tensor.chunk(len(shapes)), shapes, strict=True)]


def join(key: str, tensors: list[Tensor]) -> Tensor:
    """Turns our tensors into the file's; the inverse of `split`."""
    joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    return joined.reshape(original_shape(key, [tuple(t.shape) for t in tensors]))
