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
SCHEDULERS = {  # our name of a solver -> diffusers' class and options
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", {}),
}


def reference_pipeline(pipe: Pipeline, kind: str = "txt2img", scheduler: str = "DDIMScheduler", **options):
    """The same weights in diffusers, with the model's schedule as its folder would hold it."""
    config = pipe.denoiser.config
    unet = AsUNet.of(config) if isinstance(config, DiTConfig) else reference_unet(config)
    unet.load_state_dict(pipe.denoiser.state_dict())
    reference = KINDS[kind](
        vae=pipe.codec.model,
        text_encoder=pipe.text.model,
        tokenizer=pipe.text.tokenizer,
        unet=unet.eval(),
        scheduler=reference_scheduler(pipe, scheduler, **options),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    reference.set_progress_bar_config(disable=True)
    return reference


def reference_scheduler(pipe: Pipeline, scheduler: str, **options):
    """A scheduler as diffusers' pipelines make it of the model's own, a DDIMScheduler."""
    ours = pipe.schedule.config
    prediction = "v_prediction" if pipe.denoiser.prediction == "v" else pipe.denoiser.prediction
    first = diffusers.DDIMScheduler(
        num_train_timesteps=ours.num_train_steps,
        beta_start=ours.beta_start,
        beta_end=ours.beta_end,
        beta_schedule="squaredcos_cap_v2" if ours.beta_schedule == "cosine" else ours.beta_schedule,
        steps_offset=ours.steps_offset,
        clip_sample=False,
        set_alpha_to_one=ours.final_abar_one,
        prediction_type=prediction,
        **({"rescale_betas_zero_snr": True} if ours.zero_terminal_snr else {}),
        **({} if ours.spacing is None else {"timestep_spacing": ours.spacing}),
    )
    return getattr(diffusers, scheduler).from_config(first.config, **options)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
