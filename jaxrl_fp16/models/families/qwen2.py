"""Qwen2, Qwen2.5 and what was distilled into them (2407.10671): biases on query, key and value."""

from jaxrl_fp16.models.families import llama_like

FAMILY = llama_like.family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=dict(rope_theta=1e6, norm_eps=1e-6, tie_embeddings=False, qkv_bias=True, output_bias=False,
                  mlp_bias=False, qk_norm=False, max_positions=32768),
    absent=dict(rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=32768,
                num_key_value_heads=32),
    switches={},
)
