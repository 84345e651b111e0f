"""Tiny configurations of any transformers family, by the field names that families share.

A rule is only used where the family's default configuration has the field with a value of the same
kind, so that a table of names serves all families. What the rules get wrong stands in overrides.py.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 64, 4, 2, 16, 2, 256
WINDOW = 4  # shorter than any text, so that a sliding window masks something
MOST_LAYERS = 4

_GROUPS: tuple[tuple[int, str], ...] = (
    (HIDDEN, "hidden_size d_model n_embd embed_dim emb_dim embedding_size decoder_hidden_size "
    "encoder_hidden_size dim n_embed hidden_dim out_hidden_size projection_dim text_hidden_size "
    "word_embed_proj_dim output_hidden_size encoder_hidden_dim attention_hidden_size "
    "conv_channels decoder_embed_dim vision_output_dim projector_hidden_size lm_hidden_size "
    "hidden_size_per_layer_input d_hidden shared_image_embedding_size embedding_dim width "
    "fpn_hidden_size audio_hidden_size enc_to_dec_proj_dim n_state pooler_output_size "
    "backbone_hidden_size prompt_embed_dim lru_width cross_attention_hidden_size qk_hidden_size"),
    (96, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_inner d_ff mlp_dim "
    "moe_intermediate_size ffn_hidden_size feedforward_size encoder_intermediate_size "
    "decoder_intermediate_size shared_expert_intermediate_size intermediate_dim ff_dim "
    "dim_feedforward feed_forward_hidden_size shared_intermediate_size dff inner_dim "
    "expert_ffn_hidden_size moe_shared_expert_intermediate_size expert_ffn_size "
    "intermediate_size_mlp block_ff_dim"),
    (HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads attention_heads "
    "decoder_num_attention_heads encoder_num_attention_heads num_encoder_attention_heads heads "
    "num_mem_heads num_codebook_heads num_experts n_routed_experts num_local_experts "
    "moe_num_experts linear_num_value_heads linear_num_heads index_n_heads "
    "max_source_text_length mamba_d_conv moe_n_experts num_attn_heads"),
    (2, "decoder_attention_heads num_decoder_attention_heads num_key_value_heads num_kv_heads "
    "decoder_num_key_value_heads encoder_num_key_value_heads num_experts_per_tok moe_topk "
    "moe_k top_k_experts num_hidden_layers encoder_layers decoder_layers n_layer n_layers "
    "num_layers num_decoder_layers num_encoder_layers depth decoder_num_hidden_layers "
    "encoder_num_hidden_layers attention_layers resampler_depth num_blocks n_group "
    "linear_num_key_heads num_adapter_layers decoder_depth num_experts_per_token "
    "num_query_groups temporal_patch_size n_group_experts num_selected_experts num_codebooks "
    "text_num_hidden_layers speech_encoder_layers encoder_num_layers predictor_depth "
    "memory_attention_num_layers refiner_num_hidden_layers num_hidden_groups num_hash_layers "
    "decoder_num_layers num_memory_blocks n_encoder_layers resampler_n_layers "
    "qformer_layers num_register_tokens pred_num_hidden_layers"),
    (HEAD_DIM, "head_dim attention_head_dim attention_head_size d_kv d_head qk_nope_head_dim "
    "qk_rope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim "
    "mamba_d_state mamba_d_head mamba_head_dim mamba_chunk_size num_mel_bins qk_head_dim_ "
    "kv_channels state_size ssm_state_size num_feature_bins resampler_head_dim dim_head "
    "swa_head_dim global_head_dim encoder_head_dim decoder_head_dim chunk_length rotary_dim "
    "nope_head_dim feat_dim n_mels mamba_headdim"),
    (32, "q_lora_rank kv_lora_rank image_size qk_head_dim o_lora_rank upsample_initial_channel "
    "n_codebook_dim base_channels residual_hidden_size global_attention_dim img_size "
    "pretrain_image_size latent_size adapter_hidden_size time_step_rank mlp_hidden_size"),
    (12, "v_head_dim num_queries"),
    (8, "patch_size mamba_n_heads mamba_num_heads num_query_tokens num_conv_pos_embeddings "
    "encoder_stride mamba_dt_rank perceiver_num_latents resampler_n_latents num_latents "
    "num_image_tokens n_mamba_heads max_text_len"),
    (WINDOW, "sliding_window local_attention window_size attention_chunk_size local_window_size "
    "attention_window_size sliding_window_size num_conv_pos_embedding_groups local_attn_window "
    "swa_window_size window index_topk sliding_attention_window attention_window"),
    (1, "n_shared_experts num_shared_experts topk_group first_k_dense_replace moe_layer_start_index "
    "moe_num_shared_experts num_dense_layers num_residual_layers attn_layer_offset_ "
    "num_nextn_predict_layers_ decoder_start_layer mamba_n_groups n_groups max_window_layers"),
    (VOCABULARY, "vocab_size decoder_vocab_size vocab_size_per_layer_input text_vocab_size "
    "codebook_size audio_vocab_size num_embeddings tgt_vocab_size src_vocab_size "
    "encoder_vocab_size num_codes"),
    (128, "max_position_embeddings n_positions max_target_positions max_sequence_length n_ctx "
    "max_seq_len seq_length max_2d_position_embeddings max_seq_length num_position_embeddings"),
    (20, "max_source_positions"),
)
# Fields that some families leave unset and cannot do without.
UNSET = set(
    "head_dim num_key_value_heads n_routed_experts num_experts vocab_size "
    "moe_intermediate_size num_experts_per_tok n_shared_experts top_k_experts".split()
)
SIZES = {name: size for size, names in _GROUPS for name in names.split()}

LISTS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "depths": lambda old: [2] * len(old),
    "num_heads": lambda old: [2**i for i in range(len(old))],
    "num_attention_heads": lambda old: [2**min(i, 2) for i in range(len(old))],
    "hidden_sizes": lambda old: [16 * 2**i for i in range(len(old))],
    "neck_hidden_sizes": lambda old: [16 * 2**i for i in range(len(old))],
    "embed_dim": lambda old: [16 * 2**i for i in range(len(old))],
    "image_size": lambda old: [32] * len(old),
    "patch_size": lambda old: [8] * len(old),
    "conv_dim": lambda _: [32, 32, 32],
    "conv_stride": lambda _: [4, 2, 2],
    "conv_kernel": lambda _: [8, 3, 3],
    "sliding_window": lambda old: [WINDOW] * len(old),
}
_TOKENS = {"pad": 0, "bos": 1, "eos": 2, "cls": 1, "sep": 2, "unk": 3, "mask": 4, "decoder_start": 1}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")


def shrink(
    config_class: type[PreTrainedConfig], overrides: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """Return a tiny configuration of a family.

    Args:
        config_class: the family's class.
        overrides: fields that the rules get wrong; a dictionary for a part of the configuration
            holds the overrides of that part.
    """
    return _shrunk(config_class(), overrides or {})


def _shrunk(default: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    fields = {
        name: value for name, value in vars(default).items() if not name.startswith(("_", "transf"))
    }
    layers = _kept_layers(fields)
    given: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            given[name] = _shrunk(value, overrides.get(name, {}))
        elif name not in overrides:
            small = _small(name, value, fields, layers)
            if small != value:
                given[name] = small
    parts = {name for name, value in given.items() if isinstance(value, PreTrainedConfig)}
    given.update({name: value for name, value in overrides.items() if name not in parts})
    return type(default)(**given)


def _small(name: str, value: Any, fields: dict[str, Any], layers: list[int]) -> Any:
    """Return the small value of one field; the same value if no rule speaks of it."""
    if name.endswith(("_token_id", "_token_index", "_token_ids")):
        return _token(name, value)
    if value is None and name in UNSET:
        return SIZES[name]
    if isinstance(value, bool) or value is None or name in ("id2label", "label2id"):
        return value
    if name in _LAYER_COUNTS:
        return len(layers)
    if name == "num_key_value_heads" and "kv_lora_rank" in fields:
        return HEADS  # latent attention makes the keys of every head
    if isinstance(value, int):
        return SIZES.get(name, value)
    if isinstance(value, list | tuple):
        if name in LISTS:
            return LISTS[name](list(value))
        if value and len(value) == _layer_count(fields):
            return [value[layer] for layer in layers]
    if isinstance(value, dict):
        return _small_rope(value)
    return value


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Fit the sections of a rotary embedding of several axes to half the head's dimension."""
    small = {k: _small_rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    if isinstance(small.get("mrope_section"), list):
        small["mrope_section"] = [2, 3, 3]
    return small


def _token(name: str, value: Any) -> Any:
    """Return an identifier inside the vocabulary, the same in every part of a configuration."""
    if value is None or isinstance(value, list):
        return value if value is None else [_token(name, value[0])]
    stem = name.rsplit("_token_", 1)[0]
    if stem not in _TOKENS:
        _TOKENS[stem] = 100 + len(_TOKENS)
    return _TOKENS[stem]


def _layer_count(fields: dict[str, Any]) -> int | None:
    counts = (fields.get(name) for name in _LAYER_COUNTS)
    return next((count for count in counts if isinstance(count, int)), None)


def _kept_layers(fields: dict[str, Any]) -> list[int]:
    """Return which layers of the default are kept: one of every kind that a list names."""
    count = _layer_count(fields)
    kept: set[int] = set()
    for name, value in fields.items():
        if isinstance(value, list) and value and len(value) == count and name not in LISTS:
            kinds = [repr(entry) for entry in value]
            if len(set(kinds)) <= MOST_LAYERS:
                kept |= {kinds.index(kind) for kind in kinds}
    for layer in range(count or LAYERS):
        if len(kept) >= LAYERS:
            break
        kept.add(layer)
    return sorted(kept)
