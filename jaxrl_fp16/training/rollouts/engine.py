"""What makes rollouts for a run: the one place that knows which arguments of a run a sampler takes.

n: prompts.  P: prompt columns.
"""

from jaxrl_fp16.models.attention import kind_for
from jaxrl_fp16.parallel import row_shards, shard_batch
from jaxrl_fp16.sampling import make_sampler


def make_engine(setup, model, sampling=None, precision=None):
    """`engine(params, tokens, mask, key) -> Rollout` of left-padded host prompts int32 [n,P] and their mask.

    Args:
      setup: of the run; its tokenizer's ids end a response and fill what follows.
      model: the Decoder that samples; its attention is `kind_for` the precision.
      sampling: a SamplingConfig; None: section `sampling`.
      precision: a Precision; None: the run's `rollout_precision`.
    """
    precision = precision or setup.rollout_precision
    model = model.clone(attention=kind_for(model.attention, precision.policy.compute_dtype))
    sample = make_sampler(
        model, precision.policy, sampling or setup.config.sampling, eos_id=setup.eos_ids, pad_id=setup.pad_id,
        tokenizer=setup.tokenizer, lockstep=row_shards(setup.mesh) > 1,
    )
    return lambda params, tokens, mask, key: sample(params, *shard_batch((tokens, mask), setup.mesh), key)
