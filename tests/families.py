"""Tiny random configs for the decoder families of transformers, buildable offline on a CPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Overrides = dict[str, Any]

_IDS: Overrides = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _tiny(*unknown: str, **overrides: Any) -> Overrides:
    """The attribute names that llama started and most families share, less those this family does not know."""
    shared = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        **_IDS,
    }
    return _without(shared, *unknown) | overrides


def _gpt(**overrides: Any) -> Overrides:
    """The attribute names that gpt2 started."""
    return {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **_IDS} | overrides


def _without(overrides: Overrides, *names: str) -> Overrides:
    return {name: value for name, value in overrides.items() if name not in names}


_SLIDING_THEN_FULL: Overrides = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_FULL_THEN_SLIDING: Overrides = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
_LINEAR_THEN_FULL: Overrides = {"layer_types": ["linear_attention", "full_attention"]}
_DENSE_THEN_SPARSE: Overrides = {"mlp_layer_types": ["dense", "sparse"]}

_EXPERTS: Overrides = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS: Overrides = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS: Overrides = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT_ATTENTION: Overrides = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
_INDEXER: Overrides = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
_GATED_DELTA: Overrides = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    **_LINEAR_THEN_FULL,
}
_MAMBA: Overrides = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 8,
    "conv_kernel": 4,
    "expand": 2,
    **_IDS,
}
_MAMBA2_MIXER: Overrides = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}

FAMILIES: dict[str, Overrides] = {
    "afmoe": _tiny(**_EXPERTS, num_shared_experts=1, num_dense_layers=1, **_SLIDING_THEN_FULL),
    "apertus": _tiny("head_dim"),
    "arcee": _tiny(),
    "aria_text": _tiny(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    "axk1": _tiny(**_LATENT_ATTENTION, **_ROUTED_EXPERTS, **_DENSE_THEN_SPARSE),
    "axk2": _tiny(**_LATENT_ATTENTION, **_ROUTED_EXPERTS, **_DENSE_THEN_SPARSE, **_INDEXER, gated_norm_rank=8),
    "bailing_hybrid": _tiny(
        **_without(_LATENT_ATTENTION, "q_lora_rank"),
        **_LINEAR_THEN_FULL,
        **_DENSE_THEN_SPARSE,
        num_experts=4,
        num_experts_per_token=2,
        moe_intermediate_size=32,
        num_expert_group=1,
        topk_group=1,
        linear_head_dim=16,
        linear_num_heads=4,
    ),
    "bamba": _tiny("head_dim", attn_layer_indices=[1], **_MAMBA2_MIXER),
    "beam": _tiny(**_EXPERTS, **_SLIDING_THEN_FULL, **_DENSE_THEN_SPARSE, n_group=1, topk_group=1),
    "biogpt": _tiny("num_key_value_heads", "head_dim"),
    "bitnet": _tiny("head_dim"),
    "bloom": {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4, **_IDS},
    "blt": {
        "vocab_size": 260,
        "max_position_embeddings": 64,
        "local_attention_window_len": 8,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 100,
        "patcher_config": _tiny("head_dim", vocab_size=260),
        "encoder_config": _tiny("head_dim", vocab_size=260, num_hidden_layers=1, hidden_size_global=128),
        "decoder_config": _tiny("head_dim", vocab_size=260, hidden_size_global=128),
        "global_config": _tiny("head_dim", "vocab_size", hidden_size=128, intermediate_size=256),
        # Unknown to the config, yet generate sizes its cache by it.
        "num_hidden_layers": 2,
        **_IDS,
    },
    "codegen": _gpt(rotary_dim=8),
    "cohere": _tiny("head_dim"),
    "cohere2": _tiny("head_dim", **_SLIDING_THEN_FULL),
    "cohere2_moe": _tiny(num_experts=4, num_experts_per_tok=2, **_SLIDING_THEN_FULL, **_DENSE_THEN_SPARSE),
    "cohere_compass_text": _tiny(
        "head_dim",
        **_SLIDING_THEN_FULL,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    ),
    "cpmant": {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "dim_head": 16,
        "dim_ff": 128,
        "num_hidden_layers": 2,
        "position_bias_num_buckets": 32,
        "position_bias_max_distance": 64,
        "prompt_types": 4,
        "prompt_length": 8,
        "segment_types": 4,
        **_IDS,
    },
    "ctrl": _gpt(dff=128),
    "cwm": _tiny(**_FULL_THEN_SLIDING),
    "dbrx": {
        "vocab_size": 128,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        **_IDS,
    },
    "deepseek_v2": _tiny(**_LATENT_ATTENTION, **_ROUTED_EXPERTS, first_k_dense_replace=1),
    "deepseek_v3": _tiny(**_LATENT_ATTENTION, **_ROUTED_EXPERTS, first_k_dense_replace=1),
    "deepseek_v32": _tiny(**_LATENT_ATTENTION, **_ROUTED_EXPERTS, **_DENSE_THEN_SPARSE, **_INDEXER),
    "deepseek_v4": _tiny(
        num_key_value_heads=1,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        q_lora_rank=32,
        o_lora_rank=16,
        o_groups=2,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        hc_mult=2,
        sliding_window=8,
        partial_rotary_factor=0.5,
        **_INDEXER,
    ),
    "diffllama": _tiny(),
    "doge": _tiny("head_dim", is_moe=True, num_experts=16, num_experts_per_tok=2),
    "dots1": _tiny("head_dim", **_ROUTED_EXPERTS, first_k_dense_replace=1),
    "dots3_note_text": _tiny(
        **_LATENT_ATTENTION | {"head_dim": 24},
        **_ROUTED_EXPERTS,
        **_DENSE_THEN_SPARSE,
        **_INDEXER,
        layer_types=["indexed_attention", "sliding_attention"],
        sliding_window=8,
        shared_experts_intermediate_size=32,
        per_layer_config={1: {"kv_lora_rank": 32}},
    ),
    "ernie4_5": _tiny(),
    "ernie4_5_moe": _tiny(
        "head_dim",
        moe_intermediate_size=32,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=1,
    ),
    "exaone4": _tiny("head_dim", **_SLIDING_THEN_FULL),
    "exaone_moe": _tiny(
        "head_dim",
        **_EXPERTS,
        **_SLIDING_THEN_FULL,
        **_DENSE_THEN_SPARSE,
        num_shared_experts=1,
        n_group=1,
        topk_group=1,
    ),
    "falcon": _tiny(
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        num_kv_heads=2,
        new_decoder_architecture=True,
        ffn_hidden_size=128,
    ),
    "falcon_h1": _tiny("head_dim", mamba_d_ssm=128, **_MAMBA2_MIXER),
    "falcon_mamba": _MAMBA | {"time_step_rank": 4},
    "flex_olmo": _tiny("head_dim", num_experts=4, num_experts_per_tok=2),
    "flint": _tiny(**_EXPERTS, **_FULL_THEN_SLIDING, shared_expert_intermediate_size=32, mlp_only_layers=[0]),
    "gemma": _tiny(),
    "gemma2": _tiny(query_pre_attn_scalar=16, **_SLIDING_THEN_FULL),
    "gemma3_text": _tiny(query_pre_attn_scalar=16, **_SLIDING_THEN_FULL),
    "gemma3n_text": _tiny(
        num_hidden_layers=4,
        intermediate_size=[128, 128, 128, 128],
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        sliding_window=8,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        laurel_rank=8,
    ),
    "gemma4_text": _tiny(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        per_layer_config={1: {"head_dim": 32}, 3: {"head_dim": 32}},
        sliding_window=8,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
    ),
    "gemma4_unified_text": _tiny(**_SLIDING_THEN_FULL, per_layer_config={1: {"head_dim": 32}}),
    "glm": _tiny(),
    "glm4": _tiny(),
    "glm4_moe": _tiny("head_dim", **_ROUTED_EXPERTS, first_k_dense_replace=1),
    "glm4_moe_lite": _tiny(**_LATENT_ATTENTION, **_ROUTED_EXPERTS, **_DENSE_THEN_SPARSE),
    "glm_moe_dsa": _tiny(**_LATENT_ATTENTION, **_ROUTED_EXPERTS, **_DENSE_THEN_SPARSE, **_INDEXER),
    "gpt-sw3": _gpt(),
    "gpt2": _gpt(),
    "gpt_bigcode": _gpt(),
    "gpt_neo": {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 64,
        **_IDS,
    },
    "gpt_neox": _tiny("num_key_value_heads", "head_dim"),
    "gpt_neox_japanese": _tiny("num_key_value_heads", "head_dim", "intermediate_size"),
    "gpt_oss": _tiny(**_LOCAL_EXPERTS, **_SLIDING_THEN_FULL),
    "gptj": _gpt(rotary_dim=8),
    "granite": _tiny("head_dim"),
    "granite_swa": _tiny("head_dim", **_FULL_THEN_SLIDING),
    "granitemoe": _tiny("head_dim", **_LOCAL_EXPERTS),
    "granitemoe_swa": _tiny("head_dim", shared_intermediate_size=32, **_LOCAL_EXPERTS, **_FULL_THEN_SLIDING),
    "granitemoehybrid": _tiny(
        "head_dim", shared_intermediate_size=32, **_LOCAL_EXPERTS, **_LINEAR_THEN_FULL, **_MAMBA2_MIXER
    ),
    "granitemoeshared": _tiny("head_dim", shared_intermediate_size=32, **_LOCAL_EXPERTS),
    "helium": _tiny(),
    "hrm_text": _tiny("num_key_value_heads"),
    "hunyuan_v1_dense": _tiny(),
    "hunyuan_v1_moe": _tiny(num_experts=4, moe_topk=2),
    "hy_v3": _tiny(**_EXPERTS, **_DENSE_THEN_SPARSE, num_shared_experts=1),
    "hy_v4": _tiny(
        **_LATENT_ATTENTION,
        **_ROUTED_EXPERTS,
        **_DENSE_THEN_SPARSE,
        **_INDEXER,
        indexer_types=["full", "shared"],
        hc_mult=2,
    ),
    "hyperclovax": _tiny(),
    "inkling2_text": _tiny(
        unpadded_vocab_size=128,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=16,
        sliding_window_size=8,
        d_rel=4,
        rel_extent=16,
        num_hidden_layers=4,
        layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_layers_per_attn_res_block=2,
    ),
    "inkling_text": _tiny(
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=16,
        sliding_window_size=8,
        d_rel=4,
        rel_extent=16,
        layer_types=["hybrid_sliding", "hybrid"],
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        **_DENSE_THEN_SPARSE,
    ),
    "internlm3": _tiny(),
    "iquestcoder": _tiny(),
    "jais2": _tiny(),
    "jamba": _tiny(
        "head_dim",
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=4,
        expert_layer_offset=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "jetmoe": {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 16,
        "max_position_embeddings": 64,
        **_LOCAL_EXPERTS,
        **_IDS,
    },
    "kimi_linear": _tiny(
        **_LATENT_ATTENTION | {"q_lora_rank": None},
        **_LINEAR_THEN_FULL,
        **_DENSE_THEN_SPARSE,
        num_experts=4,
        num_experts_per_token=2,
        num_shared_experts=1,
        moe_intermediate_size=32,
        linear_head_dim=16,
        linear_num_heads=4,
    ),
    "kolibri1": _tiny(
        "intermediate_size",
        **_LOCAL_EXPERTS,
        **_SLIDING_THEN_FULL,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "laguna": _tiny(
        **_EXPERTS,
        **_FULL_THEN_SLIDING,
        **_DENSE_THEN_SPARSE,
        shared_expert_intermediate_size=32,
        num_attention_heads_per_layer=[4, 4],
    ),
    "lfm2": _tiny("head_dim", layer_types=["conv", "full_attention"], block_multiple_of=16),
    "lfm2_moe": _tiny("head_dim", layer_types=["conv", "full_attention"], num_dense_layers=1, **_EXPERTS),
    "lfm3": _tiny(num_hidden_layers=3, layer_types=["conv", "sliding_attention", "full_attention"], sliding_window=8),
    "llama": _tiny(),
    "llama4_text": _tiny(
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size=32,
        intermediate_size_mlp=128,
        moe_layers=[1],
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    "longcat_flash": _tiny(
        "num_hidden_layers",
        **_LATENT_ATTENTION,
        num_layers=2,
        ffn_hidden_size=128,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        expert_ffn_hidden_size=32,
    ),
    "mamba": _MAMBA | {"time_step_rank": 4},
    "mamba2": _MAMBA | {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    "mellum": _tiny(**_LOCAL_EXPERTS, **_FULL_THEN_SLIDING, **_DENSE_THEN_SPARSE, moe_intermediate_size=32),
    "mimo_v2_flash": _tiny(
        **_without(_ROUTED_EXPERTS, "n_shared_experts"),
        **_FULL_THEN_SLIDING,
        **_DENSE_THEN_SPARSE,
        v_head_dim=8,
    ),
    "minicpm3": _tiny(**_LATENT_ATTENTION, dim_model_base=32),
    "minimax": _tiny(layer_types=["full_attention", "linear_attention"], block_size=8, **_LOCAL_EXPERTS),
    "minimax_m2": _tiny(**_LOCAL_EXPERTS),
    "minimax_m3_vl_text": _tiny(
        **_LOCAL_EXPERTS,
        **_DENSE_THEN_SPARSE,
        intermediate_size=32,
        dense_intermediate_size=128,
        shared_intermediate_size=32,
        rotary_dim=8,
        index_n_heads=2,
        index_head_dim=16,
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_block_size=8,
        index_topk_blocks=1,
    ),
    "ministral": _tiny(**_SLIDING_THEN_FULL),
    "ministral3": _tiny(),
    "mistral": _tiny(sliding_window=8),
    "mixtral": _tiny(**_LOCAL_EXPERTS),
    "modernbert-decoder": _tiny(
        "num_key_value_heads", "head_dim", layer_types=["full_attention", "sliding_attention"], local_attention=16
    ),
    "mpt": {"vocab_size": 128, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, **_IDS},
    "nanochat": _tiny("head_dim"),
    "nemotron": _tiny(),
    "nemotron_h": _tiny(
        "num_hidden_layers",
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        ssm_state_size=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
    ),
    "olmo": _tiny("head_dim"),
    "olmo2": _tiny("head_dim"),
    "olmo3": _tiny("head_dim", **_SLIDING_THEN_FULL),
    "olmo_hybrid": _tiny("head_dim", **_GATED_DELTA),
    "olmoe": _tiny("head_dim", num_experts=4, num_experts_per_tok=2),
    "openai-gpt": _gpt(),
    "opt": _tiny("num_key_value_heads", "head_dim", "intermediate_size", ffn_dim=128, word_embed_proj_dim=64),
    "persimmon": _tiny("num_key_value_heads", "head_dim"),
    "phi": _tiny("head_dim"),
    "phi3": _tiny("head_dim"),
    "phimoe": _tiny("head_dim", **_LOCAL_EXPERTS),
    "qwen2": _tiny("head_dim"),
    "qwen2_moe": _tiny("head_dim", shared_expert_intermediate_size=32, mlp_only_layers=[0], **_EXPERTS),
    "qwen3": _tiny(),
    "qwen3_5_moe_text": _tiny("intermediate_size", shared_expert_intermediate_size=32, **_GATED_DELTA, **_EXPERTS),
    "qwen3_5_text": _tiny(**_GATED_DELTA),
    "qwen3_moe": _tiny("head_dim", mlp_only_layers=[0], **_EXPERTS),
    "qwen3_next": _tiny(shared_expert_intermediate_size=32, mlp_only_layers=[0], **_GATED_DELTA, **_EXPERTS),
    "qwen4_exp_text": _tiny(
        "intermediate_size",
        shared_expert_intermediate_size=32,
        **_GATED_DELTA | {"layer_types": ["linear_attention", "indexed_attention"]},
        **_EXPERTS,
        hc_count=2,
        hc_lowrank=8,
        ple_layer_ids=[1],
        ple_embed_dim=16,
        heads_per_ngram=2,
        ngram_vocab_size_base=100,
        make_ngram_vocab_size_divisible_by=8,
        split_ngram_parts=2,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=4,
    ),
    "recurrent_gemma": _tiny(
        "max_position_embeddings",
        num_hidden_layers=3,
        lru_width=64,
        attention_window_size=8,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "rwkv": {
        "vocab_size": 128,
        "context_length": 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "attention_hidden_size": 64,
        "intermediate_size": 128,
        **_IDS,
    },
    "seed_oss": _tiny(),
    "smollm3": _tiny("head_dim", no_rope_layers=[1, 0]),
    "solar_open": _tiny("intermediate_size", **_ROUTED_EXPERTS),
    "stablelm": _tiny("head_dim"),
    "starcoder2": _tiny("head_dim"),
    "vaultgemma": _tiny(query_pre_attn_scalar=16, **_SLIDING_THEN_FULL),
    "xglm": {
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "d_model": 64,
        "ffn_dim": 128,
        "num_layers": 2,
        "attention_heads": 4,
        **_IDS,
    },
    "xlnet": {
        "vocab_size": 128,
        "d_model": 64,
        "n_layer": 2,
        "n_head": 4,
        "d_head": 16,
        "d_inner": 128,
        **_IDS,
    },
    "xlstm": {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_blocks": 2,
        "num_heads": 4,
        "qk_dim_factor": 1.0,
        "chunk_size": 16,
        **_IDS,
    },
    "youtu": _tiny(**_LATENT_ATTENTION, pad_token_id=None),  # Loading would zero the padding row of the embedding.
    "zamba": _tiny(
        "head_dim",
        num_hidden_layers=4,
        num_key_value_heads=4,
        n_mamba_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
    ),
    "zamba2": _tiny(
        "head_dim",
        num_hidden_layers=4,
        num_key_value_heads=4,
        n_mamba_heads=8,
        mamba_d_state=16,
        chunk_size=8,
        use_mamba_kernels=False,
        adapter_rank=8,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
    ),
    "zaya": _tiny(
        "intermediate_size",
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        router_hidden_size=16,
        layer_types=["hybrid", "hybrid_sliding"],
        sliding_window=8,
    ),
}


def _bert(**overrides: Any) -> Overrides:
    return _tiny("num_key_value_heads", "head_dim", is_decoder=True, type_vocab_size=2) | overrides


def _bart(**overrides: Any) -> Overrides:
    shared = {
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "d_model": 64,
        "decoder_layers": 2,
        "decoder_ffn_dim": 128,
        "decoder_attention_heads": 4,
        "encoder_layers": 2,
        "encoder_ffn_dim": 128,
        "encoder_attention_heads": 4,
        **_IDS,
    }
    return shared | overrides


# Encoders, and the decoder halves of encoder-decoders, that also load as causal language models.
CONVERTED_FAMILIES: dict[str, Overrides] = {
    "bart": _bart(),
    "bert": _bert(),
    "bert-generation": _without(_bert(), "type_vocab_size"),
    "big_bird": _bert(attention_type="original_full"),
    "bigbird_pegasus": _bart(attention_type="original_full"),
    "blenderbot": _bart(),
    "blenderbot-small": _bart(),
    "camembert": _bert(),
    "data2vec-text": _bert(),
    "electra": _bert(embedding_size=32),
    "ernie": _bert(),
    "marian": _bart(decoder_vocab_size=128),
    "mbart": _bart(),
    "megatron-bert": _bert(),
    "mvp": _bart(),
    "pegasus": _bart(),
    "plbart": _bart(),
    "prophetnet": {
        "vocab_size": 128,
        "max_position_embeddings": 64,
        "hidden_size": 64,
        "num_decoder_layers": 2,
        "decoder_ffn_dim": 128,
        "num_decoder_attention_heads": 4,
        "num_encoder_layers": 2,
        "encoder_ffn_dim": 128,
        "num_encoder_attention_heads": 4,
        "add_cross_attention": False,
        "is_decoder": True,
        **_IDS,
    },
    "reformer": {
        "vocab_size": 128,
        "hidden_size": 64,
        "attention_head_size": 16,
        "num_attention_heads": 4,
        "feed_forward_size": 128,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [32, 32],
        "max_position_embeddings": 64,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
        "hash_seed": 0,
        "is_decoder": True,
        **_IDS,
    },
    "rembert": _bert(input_embedding_size=32, output_embedding_size=64),
    "roberta": _bert(),
    "roberta-prelayernorm": _bert(),
    "roc_bert": _bert(
        pronunciation_embed_dim=16, pronunciation_vocab_size=128, shape_embed_dim=16, shape_vocab_size=128
    ),
    "roformer": _bert(embedding_size=64),
    "trocr": _without(_bart(), "encoder_layers", "encoder_ffn_dim", "encoder_attention_heads"),
    "whisper": _without(_bart(), "max_position_embeddings")
    | {
        "max_target_positions": 64,
        "max_source_positions": 32,
        "decoder_start_token_id": 1,
        "begin_suppress_tokens": None,
    },
    "xlm": {
        "vocab_size": 128,
        "emb_dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "causal": True,
        "max_position_embeddings": 64,
        **_IDS,
    },
    "xlm-roberta": _bert(),
    "xlm-roberta-xl": _bert(),
    "xmod": _bert(default_language="en_XX"),
}

_VISION: Overrides = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

# Language models inside a wrapper; some load as the bare decoder, others keep a vision or audio tower beside it.
MULTIMODAL_FAMILIES: dict[str, Overrides] = {
    "fuyu": {
        "text_config": FAMILIES["persimmon"] | {"model_type": "persimmon"},
        "image_size": 16,
        "patch_size": 8,
        "image_token_id": 120,
    },
    "gemma3": {
        "text_config": FAMILIES["gemma3_text"],
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "boi_token_index": 118,
        "eoi_token_index": 119,
        "image_token_index": 120,
    },
    "gemma4": {
        "text_config": FAMILIES["gemma4_text"],
        "boi_token_id": 116,
        "eoi_token_id": 117,
        "image_token_id": 118,
        "video_token_id": 119,
        "boa_token_id": 120,
        "eoa_token_index": 121,
        "audio_token_id": 122,
    },
    "gemma4_unified": {
        "text_config": FAMILIES["gemma4_unified_text"],
        "boi_token_id": 116,
        "eoi_token_id": 117,
        "image_token_id": 118,
        "video_token_id": 119,
        "boa_token_id": 120,
        "eoa_token_index": 121,
        "audio_token_id": 122,
    },
    "git": _tiny("num_key_value_heads", "head_dim", vision_config=_VISION),
    "got_ocr2": {
        "text_config": FAMILIES["qwen2"] | {"model_type": "qwen2"},
        "vision_config": _without(_VISION, "intermediate_size")
        | {"output_channels": 16, "mlp_dim": 64, "window_size": 2, "global_attn_indexes": [1]},
        "image_token_index": 120,
    },
    "llama4": {"text_config": FAMILIES["llama4_text"]},
    "moshi": _tiny("intermediate_size", ffn_dim=128),
    "moss_transcribe_diarize": {
        "text_config": FAMILIES["qwen3"] | {"model_type": "qwen3"},
        "audio_config": _without(_VISION, "image_size", "patch_size") | {"num_mel_bins": 8, "max_source_positions": 32},
        "audio_token_id": 120,
    },
    "phi4_multimodal": _tiny(
        "head_dim",
        vision_config=_VISION | {"crop_size": 16, "image_token_id": 120},
        audio_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "input_size": 16,
            "nemo_conv_channels": 16,
            "bias_max_distance": 16,
            "audio_token_id": 121,
        },
    ),
    "qwen3_5": {"text_config": FAMILIES["qwen3_5_text"]},
    "qwen3_5_moe": {"text_config": FAMILIES["qwen3_5_moe_text"]},
    "qwen4_exp": {"text_config": FAMILIES["qwen4_exp_text"]},
}

UNBUILDABLE: dict[str, str] = {
    "dots3_note": "needs vision and audio towers; its language model is dots3_note_text",
    "emu3": "builds the bare language model, whose saved config AutoModelForCausalLM cannot load back",
    "gemma3n": "its vision tower needs the timm package; its language model is gemma3n_text",
    "gemma4_assistant": "a speculative-decoding draft that reads the hidden states of gemma4, not input_ids",
    "gemma4_unified_assistant": "a speculative-decoding draft that reads the hidden states of gemma4, not input_ids",
    "mllama": "builds the bare language model, whose saved config AutoModelForCausalLM cannot load back",
    "musicgen": "takes one row of audio codes per codebook, so input_ids of shape [2, 16] do not fit",
    "musicgen_melody": "takes one row of audio codes per codebook, so input_ids of shape [2, 16] do not fit",
}


def tiny_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a tiny model of the family with random weights that depend on the seed alone."""
    overrides = (FAMILIES | CONVERTED_FAMILIES | MULTIMODAL_FAMILIES)[model_type]
    config = AutoConfig.for_model(model_type, **copy.deepcopy(overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        _fill_weights_(model)
    model.eval()
    return model


@torch.no_grad()
def _fill_weights_(model: PreTrainedModel) -> None:
    """Redraw every matrix and every bias beside one: from_config leaves some of them zero or unset."""
    for module in model.modules():
        parameters = dict(module.named_parameters(recurse=False))
        if all(parameter.ndim < 2 for parameter in parameters.values()):
            continue
        for name, parameter in parameters.items():
            if parameter.ndim >= 2 or name.endswith("bias"):
                parameter.normal_(std=0.05)
