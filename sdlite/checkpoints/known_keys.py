"""The keys of diffusers' and transformers' config.json files that sdlite knows, as data for configs.py."""

from typing import Any, NamedTuple

from sdlite.config import AutoencoderKLConfig, AutoencoderTinyConfig, Record, TextConfig

COMMON = {"_class_name", "_diffusers_version", "_name_or_path", "_commit_hash", "_use_default_values"}


class Keys(NamedTuple):
    """The keys of the class `kind`.

    fields: key -> (field of our record, the class's default), in the order in which they are written. The field is ""
    where code in configs.py translates. fixed: keys with the values that sdlite implements. harmless: keys that do not
    change the images of a Stable Diffusion model.
    """

    kind: str
    fields: dict[str, tuple[str, Any]]
    fixed: dict[str, list[Any]]
    harmless: str

    @property
    def defaults(self) -> dict[str, Any]:
        return {key: default for key, (_, default) in self.fields.items()}

    @property
    def known(self) -> set[str]:
        return {*COMMON, *self.fields, *self.fixed, *self.harmless.split()}


def _same(**defaults: Any) -> dict[str, tuple[str, Any]]:
    """Keys that our record calls the same."""
    return {key: (key, default) for key, default in defaults.items()}


def _own(record: type[Record], **defaults: Any) -> dict[str, tuple[str, Any]]:
    """All fields of a record that has the class's own names; the defaults that differ are given."""
    return _same(**{name: field.default for name, field in record.model_fields.items()} | defaults)


def _fixed(*rules: tuple[Any, ...]) -> dict[str, list[Any]]:
    """rules: names of keys, then the values that they may have."""
    return {key: allowed for names, *allowed in rules for key in names.split()}


UNET_OFF = """
    center_input_sample only_cross_attention dual_cross_attention resnet_skip_time_act class_embeddings_concat
    mid_block_only_cross_attention reverse_transformer_layers_per_block encoder_hid_dim encoder_hid_dim_type
    class_embed_type addition_embed_type addition_time_embed_dim num_class_embeds time_embedding_dim
    time_embedding_act_fn timestep_post_act time_cond_proj_dim projection_class_embeddings_input_dim
    cross_attention_norm
"""
UNET_HARMLESS = """
    dropout upcast_attention addition_embed_type_num_heads decay inv_gamma min_decay optimization_step power
    update_after_step use_ema_warmup
"""
UNET = Keys(
    "UNet2DConditionModel",
    {
        **_same(in_channels=4, out_channels=4, block_out_channels=[320, 640, 1280, 1280], layers_per_block=2),
        "down_block_types": ("", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]),
        "up_block_types": ("", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3),
        "cross_attention_dim": ("context_dim", 1280),
        "attention_head_dim": ("num_heads", 8),  # diffusers keeps this name of the number of heads for old configs
        "num_attention_heads": ("", None),
        "norm_num_groups": ("num_groups", 32),
        "use_linear_projection": ("use_linear_projection", False),
        "transformer_layers_per_block": ("", 1),
        "sample_size": ("", None),
    },
    _fixed(
        ("flip_sin_to_cos", True),
        ("freq_shift", 0),
        ("downsample_padding mid_block_scale_factor resnet_out_scale_factor", 1),
        ("conv_in_kernel conv_out_kernel", 3),
        ("norm_eps", 1e-5),
        ("act_fn", "silu", "swish"),
        ("mid_block_type", "UNetMidBlock2DCrossAttn"),
        ("time_embedding_type", "positional"),
        ("attention_type resnet_time_scale_shift", "default"),
        (UNET_OFF, None, False),
    ),
    UNET_HARMLESS,
)
DIT = Keys(
    "PixArtTransformer2DModel",
    {
        **_same(in_channels=4, out_channels=8, patch_size=2, sample_size=128),
        "num_layers": ("depth", 28),
        "num_attention_heads": ("num_heads", 16),
        "attention_head_dim": ("", 72),
        "cross_attention_dim": ("", 1152),
        "caption_channels": ("context_dim", None),
        "interpolation_scale": ("", None),
        "use_additional_conditions": ("", None),
    },
    _fixed(
        ("attention_bias", True),
        ("activation_fn", "gelu-approximate"),
        ("norm_type", "ada_norm_single"),
        ("norm_elementwise_affine", False),
        ("norm_eps", 1e-6),
        ("attention_type", "default"),
    ),
    # the two numbers are only checked for being there; the last two are deprecated and do nothing
    "dropout upcast_attention norm_num_groups num_embeds_ada_norm use_linear_projection num_vector_embeds",
)
KL = Keys(
    "AutoencoderKL",
    {
        **_own(AutoencoderKLConfig, block_out_channels=[64], layers_per_block=1),
        "down_block_types": ("", ["DownEncoderBlock2D"]),
        "up_block_types": ("", ["UpDecoderBlock2D"]),
    },
    _fixed(
        ("act_fn", "silu", "swish"),
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
        ("latents_mean latents_std", None),
    ),
    "sample_size force_upcast",
)
TINY = Keys(
    "AutoencoderTiny",
    _own(AutoencoderTinyConfig),
    _fixed(("act_fn", "relu"), ("upsample_fn", "nearest")),
    "sample_size force_upcast block_out_channels",
)
TEXT_HARMLESS = """
    projection_dim attention_dropout dropout initializer_factor initializer_range torch_dtype dtype transformers_version
    chunk_size_feed_forward id2label label2id problem_type output_hidden_states output_attentions return_dict use_cache
    gradient_checkpointing bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores prefix remove_invalid_values repetition_penalty
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torchscript typical_p use_bfloat16
"""
TEXT = Keys(
    "CLIPTextModel",
    _own(
        TextConfig,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        pad_token_id=1,  # such ids are often placeholders; the tokenizer's are used
    ),
    _fixed(
        ("model_type", "clip_text_model"),
        ("architectures", None, "CLIPTextModel", "CLIPTextModelWithProjection"),  # the projection is not used
        ("is_decoder is_encoder_decoder add_cross_attention", False),
        ("pruned_heads", {}),
        ("quantization_config", None),
    ),
    TEXT_HARMLESS,  # for training and for generating text
)

# Classes whose configs describe the diffusion that Stable Diffusion is trained on, with their own defaults where these
# differ from DDIMScheduler's. Which of them a folder names does not matter otherwise: a Request names its solver.
PLAIN_SCHEDULERS = """
    DDIM DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE
    EulerAncestralDiscrete EulerDiscrete LMSDiscrete SASolver UniPCMultistep
"""
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS: dict[str, dict[str, Any]] = {
    **{f"{name}Scheduler": {} for name in PLAIN_SCHEDULERS.split()},
    "PNDMScheduler": {"set_alpha_to_one": False},
    **{f"{name}Scheduler": SD_BETAS for name in ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")},
    **{f"{name}Scheduler": SD_BETAS | {"beta_schedule": "scaled_linear"} for name in ("LCM", "TCD")},
}
SCHEDULE_HARMLESS = """
    clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value skip_prk_steps variance_type
    interpolation_type use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_flow_sigmas flow_shift sigma_min
    sigma_max timestep_type final_sigmas_type solver_order algorithm_type solver_type lower_order_final euler_at_final
    use_lu_lambdas lambda_min_clipped predict_x0 disable_corrector solver_p original_inference_steps timestep_scaling
    predictor_order corrector_order tau_func noise_sampler_seed use_dynamic_shifting time_shift_type
"""
SCHEDULE = Keys(
    "DDIMScheduler",
    {
        "num_train_timesteps": ("num_train_steps", 1000),
        "beta_start": ("beta_start", 0.0001),
        "beta_end": ("beta_end", 0.02),
        "beta_schedule": ("", "linear"),
        "set_alpha_to_one": ("final_abar_one", True),
        "steps_offset": ("", 1),  # diffusers' pipeline for SD sets 1 and False, whatever a config says
        "clip_sample": ("", False),
        "prediction_type": ("", "epsilon"),
        "rescale_betas_zero_snr": ("zero_terminal_snr", False),
        "timestep_spacing": ("spacing", None),
    },
    _fixed(("trained_betas", None)),
    SCHEDULE_HARMLESS,  # settings of single solvers
)

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
DIT_PIPELINES = ("SdlitePipeline",)  # diffusers has none for a Transformer with CLIP, only its parts
MODEL_INDEX = {
    "unet": ("UNet2DConditionModel",),
    "transformer": ("PixArtTransformer2DModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": tuple(SCHEDULERS),
}
MODEL_INDEX_HARMLESS = COMMON | {"safety_checker", "feature_extractor", "requires_safety_checker", "image_encoder"}
