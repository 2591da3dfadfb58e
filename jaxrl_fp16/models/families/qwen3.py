"""Qwen3's dense models (2505.09388): an RMSNorm on each query and key head, no biases unless asked for."""

from jaxrl_fp16.models.families import llama_like

FAMILY = llama_like.family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults=dict(rope_theta=1e6, norm_eps=1e-6, tie_embeddings=False, qkv_bias=False, output_bias=False,
                  mlp_bias=False, qk_norm=True, max_positions=32768),
    absent=dict(rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=32768,
                head_dim=128, num_key_value_heads=32),
    switches={"attention_bias": ("qkv_bias", "output_bias")},
)
