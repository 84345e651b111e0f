"""What the rules of shrink.py get wrong, family by family."""

from typing import Any

from shrink import HEADS

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}
_HALF_MROPE = {
    "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
}
_SWIN = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_SWIN_OF_FOUR = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 4, 4],
    "window_size": 2,
}
_NO_GROUPS = {"num_key_value_heads": HEADS}
_CODEC = {"upsample_groups": 32}

# Classes to build where the base alone does not attend.
HEADS = {
    "pp_ocrv5_mobile_rec": "PPOCRV5MobileRecForTextRecognition",
    "pp_ocrv5_server_rec": "PPOCRV5ServerRecForTextRecognition",
    "pp_ocrv6_small_rec": "PPOCRV6SmallRecForTextRecognition",
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {
        "max_length": 64,
        "num_mel_bins": 32,
        "time_stride": 8,
        "frequency_stride": 8,
    },
    "blip-2": {"image_token_id": 100},
    "instructblip": {"image_token_id": 100},
    "esm": {"pad_token_id": 0, "mask_token_id": 4},
    "exaone4_5": {"text_config": {}, "vision_config": {"window_size": 32}},
    "exaone4_5_vision": {"window_size": 32},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "hyperclovax_vision_v2": {"vision_config": {"window_size": 32}},
    "mask2former": {"backbone_config": _SWIN_OF_FOUR},
    "oneformer": {"backbone_config": _SWIN_OF_FOUR, "task_seq_len": 11},
    "qwen2_5_omni_thinker": {
        "text_config": _MROPE,
        "vision_config": {"window_size": 32},
    },
    "qwen2_5_vl_vision": {"window_size": 32},
    "reformer": {"axial_pos_embds": False},
    "speech_to_text": {
        "input_feat_per_channel": 16,
        "input_channels": 1,
        "max_source_positions": 64,
    },
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "bamba": {"attn_layer_indices": [1]},
    "donut-swin": _SWIN,
    "dots3_note": {
        "text_config": _NO_GROUPS,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {
            "adapter_input_size": 64,
            "adapter_out_dim": 64,
            "downsample_hidden_size": 16,
            "conv_output_size": 32,
            "num_key_value_heads": 4,
        },
    },
    "dots3_note_text": _NO_GROUPS,
    "esmc": _NO_GROUPS,
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3": {"mm_tokens_per_image": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10, "input_size": 32},
    "lilt": {"hidden_size": 96, "channel_shrink_ratio": 4},
    "llama4": {
        "vision_config": {
            "intermediate_size": 256,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        }
    },
    "llava_next": {"image_grid_pinpoints": [[32, 32], [32, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 32], [32, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 32], [32, 64]]},
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 10, "no_token_index": 11},
    "swin": _SWIN,
    "swin2sr": {**_SWIN, "patch_size": 1, "image_size": 16},
    "swinv2": {**_SWIN, "pretrained_window_sizes": [0, 0]},
    "xmod": {"default_language": "en_XX"},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "depth_anything": {
        "reassemble_hidden_size": 64,
        "backbone_config": {
            "num_hidden_layers": 4,
            "out_indices": [1, 2, 3, 4],
            "reshape_hidden_states": False,
        },
    },
    "granite_speech": {"window_size": 5},
    "granite_speech_plus": {"window_size": 5},
    "granite_speech5_encoder": _NO_GROUPS,
    "granite_speech_plus_encoder": {"input_dim": 16, "output_dim": 16},
    "instructblipvideo": {"image_token_id": 100, "video_token_id": 100},
    "kimi_k25": {"projection_hidden_size": 64},
    "mistral4": {"head_dim": 32},
    "kosmos-2": {"latent_query_num": 8},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 192,
            "num_global_layers": 2,
        },
    },
    "kyutai_speech_to_text": {"num_codebooks": 2},
    "levit": {
        "image_size": 64,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 4, 4],
        "key_dim": [8, 8, 8],
        "depths": [2, 2, 2],
        "attention_ratio": [2, 2, 2],
        "patch_size": 16,
    },
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    "prompt_depth_anything": {
        "reassemble_hidden_size": 64,
        "backbone_config": {
            "num_hidden_layers": 4,
            "out_indices": [1, 2, 3, 4],
            "reshape_hidden_states": False,
        },
    },
    "vitpose_backbone": {
        "image_size": [32, 32],
        "patch_size": [8, 8],
        "out_indices": [2],
        "part_features": 16,
        "num_experts": 1,
    },
    "xclip": {"vision_config": {"mit_hidden_size": 64}},
    "voxtral": {"audio_token_id": 101, "audio_config": {"intermediate_size": 128}},
    "zaya": {"num_experts_per_tok": 1},
    "align": {
        "projection_dim": 64,
        "vision_config": {"width_coefficient": 0.2, "depth_coefficient": 0.3, "hidden_dim": 64},
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bailing_hybrid": {"num_expert_group": 2},
    "chameleon": {
        "vocabulary_map": {"<image>": 100, **{f"IMGIMG{'ABCD'[i]}Z": 130 + i for i in range(4)}},
        "image_token_id": 100,
        "vq_config": {"channel_multiplier": [1, 1], "num_embeddings": 4},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {**_ROPE, "mrope_section": [2, 3, 3]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "clap_audio_model": {
        "spec_size": 64,
        "num_mel_bins": 16,
        "window_size": 2,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "depths": [2, 2],
        "num_attention_heads": [2, 4],
        "patch_embeds_hidden_size": 32,
    },
    "dia": {"delay_pattern": [0, 1, 2]},
    "dia_decoder": {
        "cross_num_attention_heads": 4,
        "cross_head_dim": 16,
        "cross_num_key_value_heads": 2,
        "cross_hidden_size": 64,
        "num_channels": 3,
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2_sam_vision_model": {
        "downsample_channels": [32, 64],
        "output_channels": 16,
        "global_attn_indexes": [1],
        "image_size": 64,
        "patch_size": 4,
    },
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {**_ROPE, "mrope_section": [2, 2, 4]},
        "moe_intermediate_size": [32, 16],
    },
    "florence_vision": {
        "patch_size": [7, 3, 3, 3],
        "num_heads": [1, 2, 4, 8],
        "num_groups": [1, 2, 4, 8],
    },
    "fun_asr_nano": {
        "adaptor_config": {"intermediate_size": 16, "hidden_size": 64, "num_attention_heads": 4}
    },
    "fun_asr_nano_encoder": {"num_stacked_frames": 1, "num_timestamp_prediction_layers": 1},
    "gemma3n_audio": {
        "input_feat_size": 16,
        "conf_attention_chunk_size": 4,
        "conf_attention_context_left": 5,
        "conf_num_attention_heads": 4,
        "conf_num_hidden_layers": 2,
        "sscp_conv_channel_size": [16, 8],
    },
    "gemma4_audio": {
        "subsampling_conv_channels": [16, 16],
        "attention_context_left": 5,
        "output_proj_dims": 64,
    },
    "gemma4_vision": {
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    },
    "glm5_next_text": {**_NO_GROUPS, "index_topk": 4, "index_kpool": 2, "qk_rope_head_dim": 0},
    "granite4_vision": {
        "downsample_rate": "2/4",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 1, 0, 1],
        "image_grid_pinpoints": [[32, 32], [32, 64]],
        "image_seq_length": 4,
    },
    "granite_docling_vision": {"deepstack_visual_indexes": [0], "scale_factor": 2},
    "granite_speech_encoder": {"input_dim": 16, "output_dim": 16},
    "hunyuan_vl_text": {
        "rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]},
        "head_dim": 16,
    },
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "mistral_large4_text": {
        "layer_types": ["indexed_attention"] * 2,
        "kv_source_layers": [0, 1],
        "indexer_types": ["full", "full"],
        "no_rope_layers": [1, 0],
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "molmo2_vision": {"image_size": [32, 32], "num_position_embeddings": 16},
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [-1, -2]},
        "text_config": {"rope_scaling_layers": [0]},
        "image_patch_id": 100,
    },
    "muse_spark_audio": {
        "patch_sizes": [16, 6],
        "depths": [1, 1],
        "out_hidden_size": 64,
        "hidden_sizes": [32, 64],
        "num_attention_heads": 2,
    },
    "pocket_tts": {"flow_head_config": {"condition_dim": 64}},
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 64}},
    "ovis2": {"visual_indicator_token_ids": [120, 121, 122, 123, 124]},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 2,
    },
    "muse_glimmer": {"out_hidden_size": 256},
    "neucodec": {"quantization_dim": 128, **_NO_GROUPS},
    "nemotron3_5_transcribe_asr_audio": _NO_GROUPS,
    "nemotron3_5_transcribe_word_timestamp": _NO_GROUPS,
    "nemotron3_diarization_audio": _NO_GROUPS,
    "nemotron3_diarization": {
        "chunk_length": 16,
        "chunk_right_context": 4,
        "chunk_left_context": 0,
        "head_config": {"audio_hidden_size": 64},
    },
    "nemotron3_5_transcribe_audio": {
        "diarization_config": {
            "chunk_length": 16,
            "chunk_right_context": 4,
            "chunk_left_context": 0,
            "head_config": {"audio_hidden_size": 64},
        }
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 16,
    },
    "sapiens2": {
        "num_key_value_heads_per_layer": [4, 2],
        "num_key_value_attention_heads": 2,
        "num_first_full_attention_layers": 1,
        "num_last_full_attention_layers": 0,
    },
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}, "mm_tokens_per_image": 4},
    "mobilevitv2": {"patch_size": 2, "image_size": 128},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    },
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "vitmatte": {
        "fusion_hidden_sizes": [32, 16, 16, 8],
        "backbone_config": {"num_channels": 4, "patch_size": 16, "image_size": 64},
    },
    "upernet": {"auxiliary_in_channels": 64},
    "step3p5": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "hgnet_v2": {
        "stem_channels": [3, 8, 12],
        "stage_in_channels": [12, 16, 32, 64],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 32, 64, 128],
        "stage_numb_of_layers": [1, 1, 1, 1],
    },
    "sam_prompt_encoder": {"hidden_size": 64},
    "sam_mask_decoder": {"hidden_size": 64, "iou_head_hidden_dim": 64},
    "tvp": {"num_frames": 2, "max_img_size": 128, "visual_prompt_size": 8},
    "seggpt": {"image_size": [64, 32]},
    "clvp_encoder": {"num_attention_heads": 2},
    "muse_spark": {"out_hidden_size": 256},
    "sam_vision_model": {"num_pos_feats": 32, "output_channels": 64},
    "sam_hq_vision_model": {"num_pos_feats": 32, "output_channels": 64},
    "sam_hq_prompt_encoder": {"hidden_size": 64},
    "sam_hq_mask_decoder": {"hidden_size": 64, "iou_head_hidden_dim": 64, "vit_dim": 64},
    "lw_detr": {
        "projector_in_channels": [64],
        "projector_out_channels": 64,
        "projector_scale_factors": [1.0],
    },
    "lw_detr_vit": {
        "num_windows": 4,
        "num_windows_side": 2,
        "image_size": 32,
        "window_block_indices": [0],
    },
    "unlimited_ocr_sam_vision_model": {
        "downsample_channels": [32, 64],
        "output_channels": 16,
        "global_attn_indexes": [1],
        "image_size": 64,
        "patch_size": 4,
    },
    "chmv2": {
        "post_process_channels": [16, 32, 48, 64],
        "fusion_hidden_size": 32,
        "head_hidden_size": 32,
        "number_output_channels": 16,
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": {"global_attn_indexes": [0, 1]}},
    "maskformer": {"backbone_config": _SWIN_OF_FOUR},
    "unlimited_ocr_text": _NO_GROUPS,
    "pp_doclayout_v3": {"x4_feat_dim": 16},
    "pp_doclayout_v2": {
        "class_thresholds": [0.5] * 25,
        "class_order": list(range(25)),
        "reading_order_config": {"max_2d_position_embeddings": 1024},
    },
    "qwen3_asr_encoder": {"output_dim": 64},
    "glm_image_vqmodel": {"latent_channels": 64},
    "molmo2_adapter": {"head_dim": 16},
    "sam2_hiera_det_model": {
        "embed_dim_per_stage": [16, 32, 64, 128],
        "hidden_size": 16,
        "num_attention_heads": 1,
        "blocks_per_stage": [1, 2, 1, 1],
        "image_size": [128, 128],
        "global_attention_blocks": [2],
        "window_size_per_stage": [8, 4, 4, 2],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    },
    "sam2_prompt_encoder": {"hidden_size": 64, "image_size": 128, "patch_size": 16},
    "sam2_mask_decoder": {"hidden_size": 64, "iou_head_hidden_dim": 64},
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam3_tracker_prompt_encoder": {"hidden_size": 64},
    "sam3_tracker_mask_decoder": {"hidden_size": 64, "iou_head_hidden_dim": 64},
    "depth_pro": {
        "patch_size": 16,
        "image_model_config": {"image_size": 16, "patch_size": 4},
        "patch_model_config": {"image_size": 16, "patch_size": 4},
        "fov_model_config": {"image_size": 16, "patch_size": 4},
        "intermediate_hook_ids": [1, 0],
        "intermediate_feature_dims": [64, 64],
        "scaled_images_feature_dims": [64, 64, 64],
        "fusion_hidden_size": 64,
    },
    "patchtsmixer": {"self_attn": True, "self_attn_heads": 4, "gated_attn": False},
    "blt": {"encoder_hash_byte_group_vocab": 500, "use_cache": False, "cross_attn_k": 2},
    "blt_local_encoder": {"hidden_size_global": 64, "sliding_window": 4},
    "blt_local_decoder": {"hidden_size_global": 64, "sliding_window": 4},
    "sam3_lite_text_text_model": {"num_hidden_layers": 3},
    "efficientloftr": {
        "out_features": [16, 16, 32, 64],
        "hidden_size": 64,
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_in_channels": [1, 16, 16, 32],
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 128,
        "fine_fusion_dims": [64, 32, 16],
    },
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2},
        "projector_hidden_size": 64,
        "vit_hidden_size": 64,
        "image_token_id": 100,
        "video_token_id": 101,
        "audio_token_id": 102,
    },
    "xcodec2": {"quantization_dim": 128, **_NO_GROUPS},
    "superglue": {"hidden_size": 256, "keypoint_encoder_sizes": [32, 64]},
    "emu3": {
        "vocabulary_map": {
            "<image>": 100,
            "<|extra_200|>": 101,
            **{f"<|visual token {number:06}|>": 130 + number for number in range(16)},
        },
        "image_token_id": 100,
        "vq_config": {"codebook_size": 16, "channel_multiplier": [2, 2]},
    },
}
for _family in ("autoformer", "informer", "time_series_transformer"):
    OVERRIDES[_family] = {
        "prediction_length": 4,
        "context_length": 8,
        "lags_sequence": [1, 2],
        "num_time_features": 1,
        "cardinality": [],
        "embedding_dimension": [],
        "label_length": 2,
    }
for _family in (
    "qwen2_vl",
    "qwen2_5_vl",
    "colqwen2",
    "paddleocr_vl",
    "glm_image",
    "glm4v",
    "glm46v",
    "glm_ocr",
    "glmga",
):
    OVERRIDES[_family] = {"text_config": _MROPE}
for _family in (
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "glm4v_text",
    "glm_image_text",
    "glm_ocr_text",
    "qwen2_5_omni_text",
    "paddleocr_vl_text",
):
    OVERRIDES[_family] = _MROPE
OVERRIDES["qwen2_5_vl"] = {"text_config": _MROPE, "vision_config": {"window_size": 32}}
OVERRIDES["glm4v_moe"] = {"text_config": _HALF_MROPE}
OVERRIDES["glm4v_moe_text"] = _HALF_MROPE
for _family in (
    "mimi",
    "mimi_encoder",
    "mimi_decoder",
    "pocket_tts_audio_tokenizer",
    "pocket_tts_audio_tokenizer_decoder",
):
    OVERRIDES[_family] = _CODEC
for _family in (
    "rt_detr",
    "rt_detr_v2",
    "d_fine",
    "deimv2",
    "pp_doclayout_v2",
    "pp_doclayout_v3",
    "pp_doclayout_v4",
):
    OVERRIDES[_family] = OVERRIDES.get(_family, {}) | {
        "encoder_in_channels": [32, 64, 128],
        "decoder_in_channels": [64, 64, 64],
        "decoder_attention_heads": 4,
    }
