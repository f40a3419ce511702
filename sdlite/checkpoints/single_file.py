"""Finds the config of an original single file from its shapes, and epsilon or v from other marks.

Shapes distinguish Stable Diffusion 1 from 2, and inpainting models from others. They do not show epsilon or v, the
number of heads or the activations. So any other size needs a config: the one that sdlite wrote into the file, or the
argument `config`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from sdlite.checkpoints.compvis import UNET
from sdlite.checkpoints.weights import CheckpointError, Weights, read_json
from sdlite.config import ModelConfig, Prediction, sd15, sd21
from sdlite.files import parse_json

CONFIG_KEY = "sdlite.config"  # in the metadata of the files that sdlite writes
TITLE_KEY = "modelspec.title"
PREDICTION_KEY = "modelspec.prediction_type"  # github.com/Stability-AI/ModelSpec
SAID: dict[str | None, Prediction] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v",
    "v_prediction": "v",
    "sample": "sample",
    "x0": "sample",
}
SD2_V_SPREAD = 0.09  # of the norm below, in SD2's v models and not in its epsilon ones (ComfyUI supported_models.SD20)
SD2_V_KEY = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
MAX_SIDECAR_BYTES = 2**20
SCHEDULE_TOLERANCE = 2e-3  # what half precision does to alphas_cumprod

# First match wins: (a key, what has it).
FOREIGN = (
    (r"control_model\..*|input_hint_block\..*|controlnet_.*", "is a ControlNet, not a text-to-image model"),
    (r"conditioner\.embedders\.1\..*", "is Stable Diffusion XL"),
    (r"(model\.diffusion_model\.)?label_emb\..*", "is Stable Diffusion XL, unCLIP or another class-conditional model"),
    (r"(model\.diffusion_model\.)?double_blocks\..*", "is Flux"),
    (r"(model\.diffusion_model\.)?joint_blocks\..*", "is Stable Diffusion 3"),
    (r".*\.time_stack\..*|.*\.motion_modules\..*", "is a video model"),
)
# What a file is that has no UNet; beside one, tools that merge models leave such keys behind.
ALONE = (
    (r"lora_(unet|te)\w*_.*|.*\.lora_(up|down|A|B)\.weight", "is a LoRA, a change to a model and not a model"),
    (r"(emb_params|string_to_param|clip_[lg])(\..*)?", "is a textual inversion embedding, not a model"),
    (r"(down_blocks|up_blocks)\.\d+\.(resnets|attentions)\..*", "is the UNet of a folder; give the whole folder"),
    (
        r"(text_model\.)?encoder\.layers\.\d+\.(self_attn|mlp|layer_norm\d)\..*",
        "is a text encoder alone; give a whole model",
    ),
    (r"(encoder|decoder)\.(conv_in|mid|mid_block|layers)\..*", "is a VAE alone; give a whole model, and this as vae"),
    (r"first_stage_model\..*", "is a VAE alone; give a whole model, and this as vae"),
)


def find_config(
    path: Path, weights: Weights, keys: Mapping[str, str], config: ModelConfig | None
) -> tuple[ModelConfig, bool, list[str]]:
    """The config of a file, whether it was stated rather than inferred, and notes. keys: canonical key -> file's key.

    Raises CheckpointError for another kind of model, which it names if it can.
    """
    has_unet = f"{UNET}input_blocks.0.0.weight" in keys
    known = FOREIGN if has_unet else (*FOREIGN, *ALONE)
    foreign = next((what for pattern, what in known if any(re.fullmatch(pattern, key) for key in keys.values())), None)
    if foreign is None and not has_unet:
        foreign = "has no UNet that sdlite knows"
    if foreign is not None:
        raise CheckpointError(f"{path} {foreign}; sdlite loads Stable Diffusion 1.x and 2.x")
    if config is not None:
        return config, True, []
    if (stated := stated_config(path, weights)) is not None:
        return stated, True, []
    width, channels = (*weights.shapes[keys[f"{UNET}input_blocks.0.0.weight"]], 0, 0)[:2]
    projection = keys.get(f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    context = (0, *weights.shapes[projection])[-1] if projection else 0
    sizes = {768: sd15, 1024: sd21}
    if width != 320 or context not in sizes or channels not in (4, 9):
        raise CheckpointError(
            f"{path} has a UNet of width {width} for {channels} channels and text features of {context}, which is not "
            "Stable Diffusion 1.x or 2.x (320; 4 or 9; 768 or 1024); load it in Python with its config"
        )
    return sizes[context](channels, "epsilon"), False, _schedule_notes(path, weights, keys)


def stated_config(path: Path, weights: Weights) -> ModelConfig | None:
    """The config that sdlite wrote into a file, None without one."""
    if CONFIG_KEY not in weights.metadata:
        return None
    try:
        return ModelConfig(**parse_json(weights.metadata[CONFIG_KEY]))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: metadata {CONFIG_KEY}: {' '.join(str(error).split()):.300}") from None


def _schedule_notes(path: Path, weights: Weights, keys: Mapping[str, str]) -> list[str]:
    """Compares the file's noise schedule, where it has one, with Stable Diffusion's."""
    if "alphas_cumprod" not in keys:
        return []
    try:
        (found,) = weights.read([keys["alphas_cumprod"]]).values()
    except CheckpointError:
        return [f"{path.name}: its alphas_cumprod is damaged; Stable Diffusion's noise schedule is used"]
    schedule = sd15().schedule
    ends = schedule.beta_start**0.5, schedule.beta_end**0.5
    expected = (1 - torch.linspace(*ends, schedule.num_train_steps, dtype=torch.float64) ** 2).cumprod(0)
    if found.shape == expected.shape and torch.allclose(found.double(), expected, atol=SCHEDULE_TOLERANCE, rtol=0):
        return []
    return [f"{path.name}: its alphas_cumprod is not Stable Diffusion's noise schedule, which is used all the same"]


def find_prediction(
    path: Path, weights: Weights, keys: Mapping[str, str], config: ModelConfig, is_stated: bool
) -> tuple[Prediction, list[str]]:
    """What the UNet predicts, and a note on what says so unless the config does.

    In this order: the config if it is stated, a .yaml or .json next to the file, metadata, marker tensors, a heuristic.
    """
    if is_stated:
        return config.denoiser.prediction, []
    for said, by in ((_sidecar(path), "file next to the model"), (weights.metadata.get(PREDICTION_KEY), "metadata")):
        if said in SAID:
            return SAID[said], [f"prediction {SAID[said]}: the {by} says so"]
    if "v_pred" in keys:
        return "v", ["prediction v: the file has the marker tensor v_pred"]
    guess: Prediction = "epsilon"
    by = "what Stable Diffusion 1 and inpainting models predict"
    if config.denoiser.context_dim == sd21().denoiser.context_dim and config.denoiser.in_channels == 4:
        by = "nothing in the file, since the norm that tells them apart is not there"
        if SD2_V_KEY in keys:
            (bias,) = weights.read([keys[SD2_V_KEY]]).values()
            spread = bias.std(correction=0).item() if bias.numel() else 0.0
            guess = "v" if spread > SD2_V_SPREAD else "epsilon"
            by = f"a norm in its last block has a spread of {spread:.3f}; in v models of SD2 it is above {SD2_V_SPREAD}"
    other = "v" if guess == "epsilon" else "epsilon"
    return guess, [
        f"prediction {guess} is a guess, by {by}; if images are noise or blotches, give --prediction {other}"
    ]


def _sidecar(path: Path) -> str | None:
    """The prediction that a file of the same name with .yaml or .json states, None without one."""
    yaml, other = path.with_suffix(".yaml"), path.with_suffix(".json")
    if yaml.is_file() and yaml.stat().st_size <= MAX_SIDECAR_BYTES:
        text = yaml.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^\s*parameterization\s*:\s*[\"']?(\w+)", text, re.MULTILINE):
            return found[1]
        if re.search(r"^model\s*:", text, re.MULTILINE):
            return "epsilon"  # CompVis's default
    if other.is_file() and other.stat().st_size <= MAX_SIDECAR_BYTES:
        try:
            stated = read_json(other)
        except CheckpointError:  # often another program's notes on the model
            return None
        for key in ("prediction_type", "parameterization"):
            if isinstance(stated.get(key), str):
                return str(stated[key])
    return None
