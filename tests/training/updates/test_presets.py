"""Every preset through the whole update: microbatches of any size, and batches that teach nothing."""

import jax.numpy as jnp
import pytest

from jaxrl_fp16.objectives import PRESETS

pytestmark = pytest.mark.usefixtures("quick_compile")
NAMES = [*PRESETS, "critic"]
GROUPS = [tuple(NAMES[start:start + 6]) for start in range(0, len(NAMES), 6)]
SIZES = (1, 2, 8)  # four_devices.py has microbatches of 4


@pytest.mark.parametrize("names", GROUPS, ids=", ".join)
def test_every_microbatch_size_gives_the_loss_and_gradient_of_all_rows(bigrams, names):
    steps = bigrams.steps(names, SIZES)
    for name in names:
        for size in SIZES[:-1]:
            bigrams.assert_same(steps[name, size], steps[name, 8])
            assert steps[name, size][2] == 1


@pytest.mark.parametrize("names", GROUPS, ids=", ".join)
def test_no_token_is_no_step(bigrams, names):
    nothing = jnp.zeros_like(bigrams.batch.response_mask)
    for loss, gradient, taken in bigrams.steps(names, SIZES, response_mask=nothing).values():
        assert loss == 0 and not gradient.any() and taken == 0
