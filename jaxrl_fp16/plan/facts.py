"""What is known of a run's step before anything is compiled: sizes, and the arithmetic that it asks for.

n: prompts of a step.  P: prompt columns.  N: new tokens.  T = P + N.
"""

import jax

from jaxrl_fp16.models import FAMILIES, param_shapes
from jaxrl_fp16.models.init import plain
from jaxrl_fp16.objectives import needs_critic, needs_reference
from jaxrl_fp16.parallel import row_shards, sampling_mesh
from jaxrl_fp16.plan.programs import bytes_on_a_device, learner_on, scored_rows
from jaxrl_fp16.training.runs.learner import critic_model
from jaxrl_fp16.training.runs.run_config import resolve_algorithm
from jaxrl_fp16.training.safety.memory import estimate, trained_count


def facts_of(setup, model):
    """Plain values of a Setup and the whole model: bytes are of one device, FLOP and rows of all together.

    learner: bytes of what stays on a device from step to step. flops: of each program, once; those of the sampler by
    `prefill` and `decode`, every response as long as it may be. must_read: bytes that a decode step reads at least,
    weights and, at half of the responses' length, the cache.
    """
    config, mesh = setup.config, setup.mesh
    t, s = config.training, config.sampling
    algorithm = resolve_algorithm(config)
    learner, half = learner_on(setup, model), setup.precision.policy.compute_dtype.itemsize
    rows, columns = t.prompts_per_step * s.group_size, t.max_prompt_tokens + s.max_new_tokens
    layers, base, head = _matmul_parameters(model)
    critic = critic_model(config, model) if needs_critic(algorithm) else None
    attention = FAMILIES[model.config.family].attention(model.config)
    # A query and all keys before it: a product with the keys and one with the values.
    mixed = 4 * attention.heads * attention.head_dim * model.config.num_layers

    def forward(rows, columns):
        return rows * columns * (2 * (layers + head) + mixed * columns / 2)

    def learn(rows):
        again = 2 * layers + mixed * columns / 2 if model.remat else 0
        # Frozen weights take part in the backward pass, and have no gradient of their own.
        spared = 0 if model.lora is None else 2 * (base + head)
        return 3 * forward(rows, columns) + rows * columns * (again - spared)

    sampled = sampling_mesh(config.mesh, mesh)
    shards, tensor = row_shards(sampled), sampled.shape["tensor"]
    slots = min(rows, s.max_rows or rows)
    kept = half * attention.cached * model.config.num_layers * (t.max_prompt_tokens + s.max_new_tokens / 2)
    prefill = t.prompts_per_step * t.max_prompt_tokens * (2 * layers + mixed * t.max_prompt_tokens / 2)
    decode = rows * (2 * (layers + head) + mixed * (t.max_prompt_tokens + s.max_new_tokens / 2))
    updates = t.epochs * rows // t.minibatch_size
    return {
        "layers": model.config.num_layers, "parameters": sum(x.size for x in jax.tree.leaves(param_shapes(model))),
        "kv_heads": attention.kv_heads, "attention": model.attention, "remat": model.remat,
        "precision": setup.precision.name, "rollout_precision": setup.rollout_precision.name,
        "half": half, "rows": rows, "columns": columns,
        "updates": updates, "scored": 2 if needs_reference(algorithm) else 1,
        "new_tokens": s.max_new_tokens, "mesh": dict(mesh.shape),
        "learner": {
            "policy": bytes_on_a_device(learner.actor), "policy parameters": bytes_on_a_device(learner.actor.params),
            "critic": bytes_on_a_device(learner.critic) if learner.critic else 0,
            "critic parameters": bytes_on_a_device(learner.critic.params) if learner.critic else 0,
            "reference": bytes_on_a_device(learner.reference)
            if learner.reference is not None and t.reference == "device" else 0,
        },
        "flops": {"prefill": prefill, "decode": decode * s.max_new_tokens,
                  "scorer": forward(scored_rows(config), columns),
                  "values": forward(rows, columns), "update": learn(t.minibatch_size),
                  "critic update": learn(t.minibatch_size)},
        "must_read": half * (layers + head) / tensor + kept * slots / shards / _heads_apart(attention, tensor),
        "rounds": -(-rows // slots), "decodes in steps": mesh.size == 1,
        "estimate": estimate(config, model, mesh, setup.precision.policy.compute_dtype,
                             reference=needs_reference(algorithm), critic=critic),
    }


def _matmul_parameters(model):
    """Of one model: those of the layers' kernels with their adapters, of the kernels alone, and of the head."""
    kernels = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(plain(model))["layers"])
                  if path[-1].key == "kernel")
    adapters = 0 if model.lora is None else trained_count(model)
    return kernels + adapters, kernels, model.config.vocab_size * model.config.hidden_size


def _heads_apart(attention, tensor):
    return 1 if attention.kv_heads % tensor else tensor
