"""A decoder's body with one scalar out: PPO's critic, and a reward model."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from jaxrl_fp16.models.decoder import Decoder
from jaxrl_fp16.models.frozen import BASE, LORA, base_of, frozen_apart
from jaxrl_fp16.models.layers import Projection


class Critic(nn.Module):
    """float32 [B,T]: the value of the state after each token of left-aligned `tokens` int32 [B,T].

    segments int32 [B,T]: of packed rows, as the decoder takes them. bias: of the head; a
    reward model has none, and its body has no head of its own (`tie_embeddings`).
    """

    body: Decoder
    bias: bool = True

    @nn.compact
    def __call__(self, tokens, segments=None):
        hidden = self.body(tokens, segments=segments)
        return Projection((self.body.config.hidden_size,), (1,), self.bias, name="value")(hidden)[..., 0]


def critic_params(body_params, bias=True):
    """Parameters of a `Critic` whose body starts as a copy of `body_params` and whose values start at 0.

    A copy: both train states are donated, and a buffer can be donated once. A frozen part is shared.
    """
    params, frozen = frozen_apart(body_params)
    width = base_of(body_params)["embedding"].shape[1]
    value = {"kernel": jnp.zeros((width, 1)), **({"bias": jnp.zeros((1,))} if bias else {})}
    body = jax.tree.map(jnp.copy, params)
    if frozen is None:
        return {"body": body, "value": value}
    return {BASE: {"body": frozen}, LORA: {"body": body[LORA], "value": value}}


def decoder_of(model):
    """The Decoder inside a Critic, or the Decoder itself."""
    return model.body if isinstance(model, Critic) else model
