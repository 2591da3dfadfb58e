"""Mistral 7B from v0.2 on and what is shaped like it (2310.06825), where no layer attends within a window."""

from jaxrl_fp16.models.families import llama_like

FAMILY = llama_like.family(
    name="mistral",
    architecture="MistralForCausalLM",
    defaults=dict(rope_theta=10000.0, norm_eps=1e-6, tie_embeddings=False, qkv_bias=False, output_bias=False,
                  mlp_bias=False, qk_norm=False, max_positions=131072),
    absent=dict(rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=131072, num_key_value_heads=8),
    switches={},
    nulls={"sliding_window": 4096},
)
