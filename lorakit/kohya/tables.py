"""The names of sd-scripts' settings, and what they are in lorakit."""

from typing import Any

SAME = {  # sd-scripts' name → lorakit's, where the value has the same meaning
    **{name: name for name in (
        "gradient_accumulation_steps", "gradient_checkpointing", "zero_terminal_snr", "conv_alpha",
        "max_grad_norm", "min_snr_gamma", "noise_offset", "multires_noise_iterations",
        "multires_noise_discount", "min_timestep", "max_timestep", "keep_tokens", "clip_skip", "seed", "weight_decay",
        "keep_tokens_separator", "secondary_separator",
    )},
    "pretrained_model_name_or_path": "base",
    "train_data_dir": "dataset",
    "output_name": "name",
    "train_batch_size": "batch_size",
    "network_weights": "start_from",
    "network_dim": "rank",
    "network_alpha": "alpha",
    "conv_dim": "conv_rank",
    "lr_warmup_steps": "warmup_steps",
    "lr_scheduler_num_cycles": "schedule_cycles",
    "lr_scheduler_power": "schedule_power",
    "debiased_estimation_loss": "debiased",
    "ip_noise_gamma": "input_perturbation",
    "huber_c": "huber_delta",
    "caption_dropout_rate": "caption_dropout",
    "flip_aug": "flip",
    "shuffle_caption": "shuffle_captions",
    "caption_tag_dropout_rate": "tag_dropout",
    "reg_data_dir": "regularisation",
    "prior_loss_weight": "prior_weight",
    "save_every_n_steps": "save_every",
    "sample_every_n_steps": "sample_every",
    "validation_split": "validation_share",
    "validate_every_n_steps": "validate_every",
}  # fmt: skip
DEFAULTS: dict[str, Any] = {  # of sd-scripts, where they differ from lorakit's
    "network_dim": 4, "network_alpha": 1, "learning_rate": 2e-6, "optimizer_type": "AdamW", "lr_scheduler": "constant",
    "max_train_steps": 1600, "min_snr_gamma": None, "resolution": 512, "train_batch_size": 1,
}  # fmt: skip
OFF_AT_0 = {  # 0 means that it is not set; the GUI writes it for an empty field
    "conv_rank", "conv_alpha", "min_snr_gamma", "save_every", "sample_every", "schedule_cycles", "schedule_power",
    "multires_noise_discount", "clip_skip", "huber_delta", "max_timestep", "validate_every", "input_perturbation",
}  # fmt: skip
GUI = {  # the GUI's names → sd-scripts'
    "max_resolution": "resolution", "optimizer": "optimizer_type", "lr_warmup": "gui_warmup_percent",
    "LoRA_type": "gui_lora_type", "LyCORIS_preset": "preset", "lora_network_weights": "network_weights",
    "sdxl_no_half_vae": "no_half_vae", "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
}  # fmt: skip
STANDARD_IGNORES = (  # fields of other types of LoRA, which the GUI saves too
    "conv_dim", "conv_alpha", "dora_wd", "factor", "algo", "preset", "unit", "constrain", "rescaled", "train_norm",
    "decompose_both", "train_on_input", "use_cp", "use_tucker", "use_scalar", "bypass_mode", "rank_dropout_scale",
    "full_matrix", "conv_block_dims", "conv_block_alphas", "conv_dims", "conv_alphas",
)  # fmt: skip
OPTIMIZERS = {
    "adamw": "adamw", "adamw8bit": "adamw8bit", "pagedadamw8bit": "paged_adamw8bit", "adafactor": "adafactor",
    "lion": "lion", "adamwschedulefree": "adamw_schedulefree", "schedulefree.adamwschedulefree": "adamw_schedulefree",
    "prodigy": "prodigy", "prodigyopt.prodigy": "prodigy",
}  # fmt: skip
NEAREST_OPTIMIZERS = {  # those that lorakit lacks, and the most similar one that it has
    "pagedadamw": "paged_adamw8bit", "pagedadamw32bit": "paged_adamw8bit", "lion8bit": "lion", "pagedlion8bit": "lion",
    "adam": "adamw", "radamschedulefree": "adamw_schedulefree", "nadam": "adamw", "radam": "adamw", "adamax": "adamw",
}  # fmt: skip
LOSSES = {"l2": "mse", "huber": "huber", "smooth_l1": "smooth_l1"}
PLAIN = {  # values that mean a LoRA
    "algo": ("lora", "locon"), "gui_lora_type": ("standard", "kohya locon", "lycoris/locon", "lora"),
    "network_module": ("networks.lora", "lycoris.kohya", "locon.locon_kohya"),
}  # fmt: skip
OTHER_MODELS = {  # words in network_module, script or LoRA_type, or a switch of the GUI → what they train
    "flux": "Flux", "sd3": "Stable Diffusion 3", "lumina": "Lumina", "hunyuan": "HunyuanImage", "anima": "Anima",
    "chroma": "Chroma",
}  # fmt: skip
OTHER_TRAINERS = {  # settings that only these programs have → their name
    ("training_method", "base_model_name"): "OneTrainer",
    ("job", "config"): "ai-toolkit",
    ("model_family", "data_backend_config"): "SimpleTuner",
    ("--model_family",): "SimpleTuner",
    ("model_type", "ema_config", "optimizer_config"): "EveryDream",
}
NOT_NEEDED = {  # lorakit always does this, finds it out itself, or it does not change the LoRA
    "cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs_to_disk", "vae_batch_size",
    "max_data_loader_n_workers", "persistent_data_loader_workers", "num_cpu_threads_per_process",
    "skip_cache_check", "text_encoder_batch_size", "cache_info", "xformers", "sdpa", "mem_eff_attn",
    "enable_bucket", "v2", "sdxl", "sdxl_checkbox", "sd3_checkbox", "flux1_checkbox", "model_list", "save_as_bool",
    "no_half_vae", "save_model_as", "save_precision", "use_safetensors", "output_dir", "logging_dir", "log_with",
    "log_prefix", "log_tracker_name", "log_tracker_config", "log_config", "save_state", "save_state_on_train_end",
    "save_last_n_steps", "save_last_n_steps_state", "save_last_n_epochs", "save_last_n_epochs_state",
    "wandb_run_name", "wandb_api_key", "no_metadata", "output_config", "caption_extension", "caption_extention",
    "huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo", "huggingface_token",
    "huggingface_repo_visibility", "save_state_to_huggingface", "resume_from_huggingface", "async_upload", "lowram",
    "lowvram", "highvram", "full_fp16", "full_bf16", "dynamo_backend", "dynamo_mode", "dynamo_use_dynamic",
    "dynamo_use_fullgraph", "torch_compile", "multi_gpu", "num_machines", "num_processes", "main_process_port",
    "gpu_ids", "extra_accelerate_launch_args", "ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph",
    "mem_eff_save", "disable_mmap_load_safetensors", "console_log_level", "console_log_file", "console_log_simple",
    "deepspeed", "zero_stage", "offload_optimizer_device", "offload_param_device", "zero3_init_flag",
    "zero3_save_16bit_model", "training_comment", "metadata_title", "metadata_author", "metadata_description",
    "metadata_license", "metadata_tags", "stop_text_encoder_training_pct", "sample_sampler", "train_on_input",
    "unit", "debug_dataset", "block_lr_zero_threshold", "ae", "clip_l", "clip_g", "t5xxl", "t5xxl_max_token_length",
    "discrete_flow_shift", "guidance_scale", "model_prediction_type", "timestep_sampling", "train_blocks",
    "split_mode", "apply_t5_attn_mask", "fp8_base_unet", "flux1_cache_text_encoder_outputs",
    "flux1_cache_text_encoder_outputs_to_disk", "weighting_scheme", "logit_mean", "logit_std", "mode_scale",
    "save_every_n_epochs", "sample_every_n_epochs", "sample_at_first",
}  # fmt: skip
