"""The keys of diffusers' and transformers' config.json files that sdlite knows, as data for configs.py.

*_MAPPED: keys that become fields, with the default of the class in the library. *_FIXED: keys with the values that
sdlite implements. *_HARMLESS: keys that make no difference to the images of a Stable Diffusion model.
"""

from typing import Any

from sdlite.config import AutoencoderTinyConfig


def _words(text: str) -> list[str]:
    return text.split()


PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
DIT_PIPELINES = ("SdlitePipeline",)  # diffusers has none for a Transformer with CLIP, only its parts
COMMON = {"_class_name", "_diffusers_version", "_name_or_path", "_commit_hash", "_use_default_values"}

UNET_MAPPED = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "attention_head_dim": 8,  # the number of heads; diffusers keeps the name for the sake of old configs
    "num_attention_heads": None,
    "norm_num_groups": 32,
    "use_linear_projection": False,
    "transformer_layers_per_block": 1,
    "sample_size": None,
}
UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "dual_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
} | {
    name: (None,)
    for name in _words(
        "reverse_transformer_layers_per_block encoder_hid_dim encoder_hid_dim_type class_embed_type "
        "addition_embed_type addition_time_embed_dim num_class_embeds time_embedding_dim time_embedding_act_fn "
        "timestep_post_act time_cond_proj_dim projection_class_embeddings_input_dim cross_attention_norm"
    )
}
UNET_HARMLESS = set(
    _words(
        "dropout upcast_attention addition_embed_type_num_heads decay inv_gamma min_decay optimization_step power "
        "update_after_step use_ema_warmup"
    )
)

DIT_MAPPED = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 128,
    "patch_size": 2,
    "interpolation_scale": None,
    "use_additional_conditions": None,
    "caption_channels": None,
}
DIT_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_single",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
    "attention_type": ("default",),
}
DIT_HARMLESS = set(
    # the two numbers are only checked for being there; the last two are deprecated and do nothing
    _words("dropout upcast_attention norm_num_groups num_embeds_ada_norm use_linear_projection num_vector_embeds")
)

KL_MAPPED = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
KL_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "latents_mean": (None,),
    "latents_std": (None,),
}
TINY_MAPPED = {name: field.default for name, field in AutoencoderTinyConfig.model_fields.items()}  # diffusers' own
TINY_FIXED: dict[str, tuple[Any, ...]] = {"act_fn": ("relu",), "upsample_fn": ("nearest",)}
CODEC_HARMLESS = {"sample_size", "force_upcast"}

TEXT_MAPPED = {
    "vocab_size": 49_408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
TEXT_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("clip_text_model",),
    "architectures": (None, "CLIPTextModel", "CLIPTextModelWithProjection"),  # of which the projection is not used
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
}
TEXT_HARMLESS = set(
    # ids come from the tokenizer; the rest is for training and for generating text
    _words(
        "bos_token_id eos_token_id pad_token_id projection_dim attention_dropout dropout initializer_factor "
        "initializer_range torch_dtype dtype transformers_version chunk_size_feed_forward id2label label2id "
        "problem_type output_hidden_states output_attentions return_dict use_cache gradient_checkpointing "
        "bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id diversity_penalty "
        "do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task "
        "forced_bos_token_id forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size "
        "num_beam_groups num_beams num_return_sequences output_scores prefix remove_invalid_values "
        "repetition_penalty return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature "
        "tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torchscript typical_p "
        "use_bfloat16"
    )
)

# Classes whose configs describe the diffusion that Stable Diffusion is trained on, with their own defaults where these
# differ from DDIMScheduler's. Which of them a folder names does not matter otherwise: a Request names its solver.
SCHEDULE_MAPPED = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "set_alpha_to_one": True,
    "prediction_type": "epsilon",
    "timestep_spacing": None,
    "rescale_betas_zero_snr": False,
}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS: dict[str, dict[str, Any]] = {
    f"{name}Scheduler": {}
    for name in _words(
        "DDIM DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE "
        "EulerAncestralDiscrete EulerDiscrete LMSDiscrete SASolver UniPCMultistep"
    )
} | {
    "PNDMScheduler": {"set_alpha_to_one": False},
    "HeunDiscreteScheduler": SD_BETAS,
    "KDPM2DiscreteScheduler": SD_BETAS,
    "KDPM2AncestralDiscreteScheduler": SD_BETAS,
    "LCMScheduler": SD_BETAS | {"beta_schedule": "scaled_linear"},
    "TCDScheduler": SD_BETAS | {"beta_schedule": "scaled_linear"},
}
SCHEDULE_FIXED: dict[str, tuple[Any, ...]] = {"trained_betas": (None,)}
SCHEDULE_HARMLESS = set(
    # settings of single solvers; steps_offset and clip_sample: SD's pipeline sets 1 and False
    _words(
        "steps_offset clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value "
        "skip_prk_steps variance_type interpolation_type use_karras_sigmas use_exponential_sigmas use_beta_sigmas "
        "use_flow_sigmas flow_shift sigma_min sigma_max timestep_type final_sigmas_type solver_order "
        "algorithm_type solver_type lower_order_final euler_at_final use_lu_lambdas lambda_min_clipped predict_x0 "
        "disable_corrector solver_p original_inference_steps timestep_scaling predictor_order corrector_order "
        "tau_func noise_sampler_seed use_dynamic_shifting time_shift_type"
    )
)

MODEL_INDEX = {
    "unet": ("UNet2DConditionModel",),
    "transformer": ("PixArtTransformer2DModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": tuple(SCHEDULERS),
}
MODEL_INDEX_HARMLESS = COMMON | {"safety_checker", "feature_extractor", "requires_safety_checker", "image_encoder"}
