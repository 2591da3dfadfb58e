"""The loss scale in the guarded step against the published rule in plain Python, over random non-finite gradients.

    JAX_PLATFORMS=cpu python benchmarks/reliability/loss_scale.py [--count 10000]

Steps of a small decoder in FP16, through the update that trains. One row's advantage is NaN or infinite where a
step shall fail, at a rate that changes as it goes, so that the scale reaches both of its bounds. At each step
scale and counters equal the oracle's; a skipped step leaves parameters, moments, step count and key as they were,
bit by bit; any other one is taken. Near its maximum a scale makes float16 overflow by itself: those steps are
counted, and the oracle is told of them.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrl_fp16 as rl
from jaxrl_fp16.precision import LossScaleConfig
from corruption import COLUMNS, MODEL, ROWS, random_batch
from runs import arguments, arrays_of, conclude, same_bits, split

CONFIGS = {
    "as configured": LossScaleConfig(growth_interval=20),
    "patient": LossScaleConfig(initial=2.0**10, growth_interval=7, hysteresis=3, minimum=2.0**6, maximum=2.0**12),
    "odd factors": LossScaleConfig(initial=1000.0, growth=3.0, growth_interval=2, backoff=0.3, minimum=0.7,
                                   maximum=5e4),
    "every step": LossScaleConfig(initial=4.0, growth_interval=1, hysteresis=2, maximum=2.0**14),
}
POISON = (math.nan, math.inf, -math.inf)
ROUGH = (0.0, 0.03, 0.3, 0.8)       # share of steps that fail, for a while each
SAFE_SCALE = 2.0**12                # no gradient here overflows float16 up to this one


@dataclasses.dataclass
class Oracle:
    """Scale and counters by the rule, as Python numbers; each product is rounded to float32, as the state is."""

    config: LossScaleConfig
    scale: float
    good: int = 0
    bad: int = 0
    skipped: int = 0

    def step(self, finite):
        c = self.config
        if finite:
            self.good += 1
            if self.good == c.growth_interval:
                self.scale, self.good, self.bad = min(_product(self.scale, c.growth), _single(c.maximum)), 0, 0
            return
        self.good, self.bad, self.skipped = 0, self.bad + 1, self.skipped + 1
        if self.bad == c.hysteresis:
            self.scale, self.bad = max(_product(self.scale, c.backoff), _single(c.minimum)), 0

    def values(self):
        return self.scale, self.good, self.bad, self.skipped


def _single(value):
    return float(np.float32(value))


def _product(a, b):
    return float(np.float32(a) * np.float32(b))


def advantages(generator, rough):
    """`([B] float32, whether a value is not finite)`."""
    values = np.array([generator.gauss(0, 1) for _ in range(ROWS)], np.float32)
    poisoned = generator.random() < rough
    if poisoned:
        values[generator.randrange(ROWS)] = generator.choice(POISON)
    return values, poisoned


def run_sequence(name, count, seed):
    """`count` steps under one config: `(row, problems)`."""
    config, generator = CONFIGS[name], random.Random(f"{seed} {name}")
    precision = rl.get_precision("fp16", config)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1))
    update = rl.make_update(MODEL, precision.policy, rl.get_algorithm("reinforce"), optimizer,
                            microbatch_size=ROWS // 2, max_new_tokens=COLUMNS)
    state = rl.init_train_state(rl.init_params(MODEL, jax.random.key(seed)), optimizer, precision.loss_scale,
                                jax.random.key(seed))
    oracle, batch, problems = Oracle(config, _single(config.initial)), random_batch(jax.random.key(seed)), []
    row = {"config": name, "steps": count, "skipped": 0, "overflows": 0, "at_minimum": 0, "at_maximum": 0}
    before, rough = _rest(state), 0.0
    for step in range(count):
        if step % 40 == 0:
            rough = generator.choice(ROUGH)
        values, poisoned = advantages(generator, rough)
        scale = oracle.scale
        state, metrics = update(state, batch.replace(advantages=jnp.asarray(values)))
        finite = math.isfinite(float(metrics["grad_norm"]))
        if finite == poisoned and (poisoned or scale <= SAFE_SCALE):
            problems.append(f"{name}, step {step}: the gradient is {'' if finite else 'not '}finite")
        row["overflows"] += not finite and not poisoned
        oracle.step(finite)
        s = state.loss_scale
        found = float(s.loss_scale), int(s.good), int(s.bad), int(s.skipped)
        if found != oracle.values() or float(metrics["loss_scale"]) != scale or bool(metrics["skipped"]) == finite:
            problems.append(f"{name}, step {step}: scale, good, bad, skipped are {found}; the rule's {oracle.values()}")
            break
        after = _rest(state)
        same = [same_bits(before[key], after[key]) for key in before]
        if not finite and not all(same):
            problems.append(f"{name}, step {step}: a skipped step changed {list(before)[same.index(False)]}")
        if finite and (after["step"] != before["step"] + 1 or all(map(same_bits, *_params(before, after)))):
            problems.append(f"{name}, step {step}: a finite step was not taken")
        before = after
        row["at_minimum"] += found[0] == _single(config.minimum)
        row["at_maximum"] += found[0] == _single(config.maximum)
    return row | {"skipped": oracle.skipped, "last_scale": oracle.scale}, problems


def _rest(state):
    """Every array but the loss scale's."""
    return arrays_of(state.replace(loss_scale=None))


def _params(*states):
    return ([array for name, array in arrays.items() if name.startswith("params.")] for arrays in states)


def main():
    parser = arguments(__doc__, 10_000, "loss_scale")
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    given = parser.parse_args()
    began = time.monotonic()
    shares = split(given.count, given.configs)
    done = [run_sequence(name, count, given.seed) for name, count in shares.items()]
    rows, problems = [row for row, _ in done], [problem for _, found in done for problem in found]
    facts = {"steps": sum(shares.values()), "skipped": sum(row["skipped"] for row in rows), "seed": given.seed,
             "seconds": time.monotonic() - began}
    return conclude("loss_scale", rows, facts, problems, given.out)


if __name__ == "__main__":
    sys.exit(main())
