"""What makes rollouts for a run: the one place that knows which arguments of a run a sampler takes.

n: prompts.  P: prompt columns.
"""

from jaxrl_fp16.models.attention import kind_for
from jaxrl_fp16.parallel import row_shards, shard_batch
from jaxrl_fp16.sampling import make_sampler, make_stepwise_sampler
from jaxrl_fp16.sampling.slots import LONG


def make_engine(setup, model, sampling=None, precision=None):
    """`engine(params, tokens, mask, key, watch=None) -> Rollout` of left-padded host prompts int32 [n,P], their mask.

    watch: takes a `Sampled` every few seconds, and may end the batch by an exception. On one device only, and for
    responses of `LONG` tokens and more: the others are one program.

    Args:
      setup: of the run; its tokenizer's ids end a response and fill what follows.
      model: the Decoder that samples; its attention is `kind_for` the precision.
      sampling: a SamplingConfig; None: section `sampling`.
      precision: a Precision; None: the run's `rollout_precision`.
    """
    precision = precision or setup.rollout_precision
    model = model.clone(attention=kind_for(model.attention, precision.policy.compute_dtype))
    sampling = sampling or setup.config.sampling
    given = dict(eos_id=setup.eos_ids, pad_id=setup.pad_id, tokenizer=setup.tokenizer)
    if setup.mesh.size == 1 and sampling.max_new_tokens >= LONG:
        sample = make_stepwise_sampler(model, precision.policy, sampling, **given)
    else:
        whole = make_sampler(model, precision.policy, sampling, **given, lockstep=row_shards(setup.mesh) > 1)
        sample = lambda params, tokens, mask, key, watch: whole(params, tokens, mask, key)

    def engine(params, tokens, mask, key, watch=None):
        return sample(params, *shard_batch((tokens, mask), setup.mesh), key, watch)

    return engine
