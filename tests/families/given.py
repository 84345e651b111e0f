"""Inputs that the makers get wrong, or do not know, family by family.

An input that stands here is always given; None leaves it out.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from makers import BATCH, FRAMES, PATCHES, TARGET, TEXT, Source

Maker = Callable[[Source], Any]


def normal(*shape: int) -> Maker:
    """Make normal numbers of a shape, after the batch."""
    return lambda source: source.normal(BATCH, *shape)


def rows(*shape: int) -> Maker:
    """Make normal numbers of a shape that has no batch of its own."""
    return lambda source: source.normal(*shape)


def ones(*shape: int) -> Maker:
    """Make a mask that hides nothing."""
    return lambda _: torch.ones(BATCH, *shape, dtype=torch.int64)


def whole(*values: Any) -> Maker:
    """Make the same integers for every example."""
    return lambda _: torch.tensor([values] * BATCH)


def tokens(*shape: int) -> Maker:
    """Make texts that are no plain rows of tokens."""
    return lambda source: source.tokens(TEXT * 99)[:, : math.prod(shape)].reshape(BATCH, *shape)


def placed(field: str, count: int) -> Maker:
    """Make texts with places for the features of a sound or an image."""

    def make(source: Source) -> Any:
        marks = torch.full((BATCH, count), source.field(field, default=-1))
        text = source.tokens(TEXT)
        return torch.cat([text[:, :5], marks, text[:, 5:]], dim=1)

    return make


def flat(maker: Maker) -> Maker:
    """Join the first two dimensions."""
    return lambda source: maker(source).flatten(0, 1)


def _places(side: int) -> list[list[int]]:
    """Return the coordinates of the patches of an image."""
    return [[row, column] for row in range(side) for column in range(side)]


GIVEN: dict[str, dict[str, Maker | None]] = {
    "blip_2_qformer": {"encoder_hidden_states": normal(9, 64)},
    "chameleon": {"pixel_values": normal(3, 8, 8)},
    "clap": {"input_features": normal(1, 64, 16)},
    "decision_transformer": {
        "states": normal(5, 17),
        "actions": normal(5, 4),
        "rewards": normal(5, 1),
        "returns_to_go": normal(5, 1),
        "timesteps": whole(0, 1, 2, 3, 4),
        "attention_mask": ones(5),
    },
    "dia": {"decoder_input_ids": tokens(TARGET, 3)},
    "gemma4_vision": {"pixel_position_ids": whole(*_places(4)), "pixel_values": normal(16, 192)},
    "glmasr": {"input_features": normal(16, 48), "input_features_mask": ones(48)},
    "granite_docling": {
        "pixel_values": normal(1, 3, 32, 32),
        "pixel_attention_mask": lambda _: torch.ones(BATCH, 1, dtype=torch.bool),
    },
    "granite_speech5_encoder": {"input_features": normal(FRAMES, 64)},
    "granite_speech5_ctc": {"input_features": normal(FRAMES, 64)},
    "granite_speech": {"input_features_mask": None},
    "hunyuan_vl": {"pixel_values": rows(32, 192)},
    "hunyuan_vl_vision": {"pixel_values": rows(32, 192)},
    "instructblipvideo": {"pixel_values": normal(2, 3, 32, 32)},
    "kimi_k25_vision": {"pixel_values": rows(32, 3, 8, 8)},
    "kimi_k25": {"pixel_values": rows(32, 3, 8, 8)},
    "kyutai_speech_to_text": {"input_ids": tokens(TEXT, 3)},
    "musicgen": {"decoder_input_ids": flat(tokens(2, TARGET))},
    "musicgen_melody": {"decoder_input_ids": flat(tokens(2, TARGET))},
    "voxtral_realtime_text": {"t_cond": rows(1, 64)},
    "granite_speech_plus": {"input_features_mask": None},
    "lightglue": {"pixel_values": normal(2, 3, 64, 64)},
    "superglue": {"pixel_values": normal(2, 3, 64, 64)},
    "minicpmv4_7_vision": {"target_sizes": whole(4, 4), "pixel_values": rows(1, 3, 8, 32 * 8)},
    "minicpm_ocr_vision": {"target_sizes": whole(4, 4), "pixel_values": rows(1, 3, 8, 32 * 8)},
    "minicpmv4_7": {"target_sizes": whole(4, 4), "pixel_values": rows(1, 3, 8, 32 * 8)},
    "pe_audio": {"input_values": normal(1, 4000)},
    "pe_audio_encoder": {"input_values": normal(1, 4000)},
    "muse_glimmer": {"pixel_values": rows(32, 384)},
    "muse_glimmer_vision": {"pixel_values": rows(32, 384)},
    "muse_spark_vision": {"pixel_values": rows(32, 384)},
    "muse_spark": {"pixel_values": rows(32, 384)},
    "muse_glimmer_assistant": {
        "noise_embeds": normal(5, 64),
        "context_hidden_states": normal(5, 128),
        "position_ids": lambda _: torch.arange(10)[None],
        "attention_mask": ones(10),
    },
    "neomme": {"pixel_values": rows(32, 192)},
    "paddleocr_vl": {"pixel_values": rows(32, 3, 8, 8)},
    "pix2struct": {
        "flattened_patches": lambda source: torch.cat(
            [
                source.tokens(2 * PATCHES).reshape(BATCH, PATCHES, 2),
                source.normal(BATCH, PATCHES, 768),
            ],
            -1,
        )
    },
    "seamless_m4t": {"input_features": None},
    "wav2vec2-bert": {"input_features": normal(FRAMES, 160)},
    "xcodec2": {
        "input_features": normal(8, 160),
        "input_features_mask": ones(8),
        "input_values": normal(1, 320 * 8),
    },
    "neucodec": {
        "input_features": normal(8, 160),
        "input_features_mask": ones(8),
        "input_values": normal(1, 320 * 8),
    },
    "timesfm2_5": {"past_values": normal(64)},
    "timesfm": {
        "past_values": normal(64),
        "past_values_padding": lambda _: torch.zeros(BATCH, 64, dtype=torch.int64),
        "freq": whole(0),
    },
    "qwen3_asr_encoder": {"input_features": normal(16, 100), "input_features_mask": ones(100)},
    "qwen3_asr": {"input_features": normal(16, 100), "input_features_mask": ones(100)},
    "nemotron3_5_transcribe_word_timestamp": {"inputs_embeds": normal(9, 64)},
    "seggpt": {
        "pixel_values": normal(3, 32, 32),
        "prompt_pixel_values": normal(3, 32, 32),
        "prompt_masks": normal(3, 32, 32),
    },
    "autoformer": {"past_values": normal(10)},
    "flava": {"image_attention_mask": None},
    "clvp": {"input_features": normal(80, 40)},
    "speecht5": {"input_values": normal(9, 64), "decoder_input_values": normal(TARGET, 64)},
    "tvp": {"pixel_values": normal(2, 3, 128, 128)},
    "perceiver": {"inputs": normal(11, 64)},
    "pi0": {
        "action_embeds": normal(5, 64),
        "pixel_attention_mask": ones(1),
        "pixel_values": normal(1, 3, 32, 32),
        "input_ids": lambda source: torch.cat(
            [torch.full((BATCH, 16), source.config.vlm_config.image_token_id), source.tokens(TEXT)],
            1,
        ),
    },
    "muse_spark_audio": {"input_values": normal(96 * 4)},
    "nemotron_asr_streaming_encoder": {"input_features": normal(64, 16)},
    "unlimited_ocr": {"pixel_values": normal(3, 64, 64)},
    "deepseek_vl_hybrid": {"high_res_pixel_values": normal(3, 32, 32)},
    "mimi_decoder": {"latents": normal(64, 9)},
    "pocket_tts_audio_tokenizer_decoder": {"latents": normal(64, 9)},
    "qwen2_audio": {"input_ids": placed("audio_token_id", 10)},
    "inkling2_vision": {"pixel_values": rows(32, 16, 16, 3)},
    "inkling2": {"pixel_values": rows(32, 16, 16, 3)},
    "glm_image": {
        "input_ids": placed("image_token_id", 16),
        "image_grid_thw": lambda _: torch.tensor([[1, 4, 4]] * 4),
        "images_per_sample": lambda _: torch.tensor([2, 2]),
    },
    "voxtral_realtime": {"input_features": normal(16, 88)},
    "molmo2": {
        "pixel_values": normal(1, 16, 192),
        "image_token_pooling": lambda _: torch.arange(32).reshape(8, 4),
        "image_grids": whole(2, 2, 0, 0),
    },
    "sam2": {"pixel_values": normal(3, 128, 128)},
    "sam2_vision_model": {"pixel_values": normal(3, 128, 128)},
    "sam2_hiera_det_model": {"pixel_values": normal(3, 128, 128)},
    "pp_ocrv5_mobile_rec": {"pixel_values": normal(3, 96, 256)},
    "pp_ocrv5_server_rec": {"pixel_values": normal(3, 64, 256)},
    "pp_ocrv6_small_rec": {"pixel_values": normal(3, 64, 256)},
    "pp_ocrv6_tiny_rec": {"pixel_values": normal(3, 64, 64)},
    "moss_transcribe_diarize": {"padding_mask": ones(40)},
    "granite4_vision": {"image_sizes": whole(32, 32), "input_ids": placed("image_token_index", 10)},
    "dots3_note": {"chunk_sample_lengths": whole(40), "input_features": None},
    "depth_pro": {"pixel_values": normal(3, 64, 64)},
    "efficientloftr": {"pixel_values": normal(2, 3, 64, 64)},
    "colqwen2": {"pixel_values": normal(16, 384)},
    "musicflamingo": {"input_ids": placed("audio_token_id", 10)},
    "vitmatte": {"pixel_values": normal(4, 64, 64)},
    "jev": {"marks": whole(3, 6), "num_options": whole(2, 2), "question_type_ids": whole(0, 0)},
    "speech-encoder-decoder": {"input_values": normal(4000), "input_features": None},
    "nemotron_h_omni": {
        "image_grid_hw": whole(4, 4),
        "pixel_values": rows(32, 192),
        "input_features_mask": None,
        "input_ids": placed("image_token_id", 4),
    },
    "emu3": {"image_sizes": whole(32, 32)},
}
