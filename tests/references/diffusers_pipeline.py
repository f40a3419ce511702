"""diffusers' pipelines around the weights of one of ours: the independent truth of whole images."""

import diffusers
import torch

from sdlite.config import DiTConfig
from sdlite.pipeline import Pipeline
from tests.references.diffusers_dit import AsUNet
from tests.references.diffusers_unet import reference_unet

KINDS = {
    "txt2img": diffusers.StableDiffusionPipeline,
    "img2img": diffusers.StableDiffusionImg2ImgPipeline,
    "inpaint": diffusers.StableDiffusionInpaintPipeline,
}


def reference_pipeline(pipe: Pipeline, kind: str = "txt2img", scheduler: str = "DDIMScheduler", **options):
    """The same weights in diffusers, with the scheduler config of Stable Diffusion's folders."""
    config = pipe.denoiser.config
    unet = AsUNet.of(config) if isinstance(config, DiTConfig) else reference_unet(config)
    unet.load_state_dict(pipe.denoiser.state_dict())
    sd = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    prediction = "v_prediction" if pipe.denoiser.prediction == "v" else pipe.denoiser.prediction
    first = diffusers.DDIMScheduler(**sd, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction)
    reference = KINDS[kind](
        vae=pipe.codec.model,
        text_encoder=pipe.text.model,
        tokenizer=pipe.text.tokenizer,
        unet=unet.eval(),
        scheduler=getattr(diffusers, scheduler).from_config(first.config, **options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    reference.set_progress_bar_config(disable=True)
    return reference


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
