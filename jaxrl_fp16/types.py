"""What flows between sampler, loss and update.

B: rows (responses).  T: columns (P prompt columns, then the response).
N: max_new_tokens.  K: kept ids of a truncated distribution.
"""

from flax import struct
import jax


@struct.dataclass
class Decisions:
    """What a sampler decided beside the tokens. Whoever scores the tokens is given all of it, as one argument.

    A Rollout and a Batch have each as a field of the same name.
    """

    support: jax.Array | None = None  # int32 [B,N,K]: kept ids, filled with -1; only with top-k or top-p


@struct.dataclass
class Rollout:
    """What the sampler returns: rows are prompt-major, `B = n * group_size`.

    Prompts are left-padded to `P`; responses start in column `P`.
    """

    tokens: jax.Array                       # int32 [B,T]; pad_id after the response's end
    mask: jax.Array                         # bool [B,T]: real tokens
    response_mask: jax.Array                # bool [B,T]: sampled, up to and with the first end
    logprobs: jax.Array                     # float32 [B,T]: of the distribution that was sampled; 0 off the response
    finished: jax.Array                     # bool [B]: ended by itself, not by the length limit
    support: jax.Array | None = None        # int32 [B,N,K]: kept ids, filled with -1; only with top-k or top-p
    full_logprobs: jax.Array | None = None  # float32 [B,T]: of the whole vocabulary at that temperature; likewise

    @property
    def decisions(self):
        """What scoring these tokens takes beside them."""
        return Decisions(self.support)


@struct.dataclass
class Batch:
    """What one optimizer step learns from."""

    tokens: jax.Array                          # int32 [B,T]
    mask: jax.Array                            # bool [B,T]: real tokens
    response_mask: jax.Array                   # bool [B,T]: tokens that the loss counts
    rollout_logprobs: jax.Array                # float32 [B,T]: log mu, by the sampler
    old_logprobs: jax.Array                    # float32 [B,T]: log pi_old, by the scorer with the sampling weights
    advantages: jax.Array                      # float32 [B] or [B,T]
    ref_logprobs: jax.Array | None = None      # float32 [B,T]: log pi_ref, with a KL term
    values: jax.Array | None = None            # float32 [B,T]: the critic's old values, with PPO
    returns: jax.Array | None = None           # float32 [B,T]: the critic's targets, with PPO
    support: jax.Array | None = None           # int32 [B,N,K]: Rollout.support

    @property
    def decisions(self):
        """What scoring these tokens takes beside them."""
        return Decisions(self.support)
