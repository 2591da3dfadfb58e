"""A compiled program's instructions, and how often they run."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.plan import hlo

TEXT = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %carry = (s32[], bf16[8,4]{1,0}) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%carry), index=1
  %gather = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%x), dimensions={0}, metadata={op_name="jit(f)/here"}
  %done = bf16[8,4]{1,0} all-gather-done(%gather)
  ROOT %out = (s32[], bf16[8,4]{1,0}) tuple(%x, %done)
}

%condition (carry: (s32[], bf16[8,4])) -> pred[] {
  %carry = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  %loop = (s32[], bf16[8,4]{1,0}) while(%p), condition=%condition, body=%body, backend_config={TRIPS}
  %other = (s32[], bf16[8,4]{1,0}) while(%p), condition=%condition, body=%body
  ROOT %all = f32[16]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}
""".replace("{TRIPS}", '{"known_trip_count":{"n":"5"}}')


def test_collectives_are_counted_with_their_loops():
    found = [(each.opcode, each.arrays, each.bytes, each.times, each.inside) for each in
             hlo.collectives(hlo.read(TEXT, steps=3))]
    gather = "all-gather", (("bf16", (8, 4)),), 64
    assert found == [(*gather, 5, ("body",)), (*gather, 3, ("body",)), ("all-reduce", (("f32", (16,)),), 64, 1, ())]
    assert hlo.collectives(hlo.read(TEXT))[0].name == "jit(f)/here"


def test_a_loop_of_xlas_own_is_read_as_often_as_it_runs():
    def step(x, w):
        return jnp.tanh(x @ w), None

    compiled = jax.jit(lambda x, w: lax.scan(step, x, w)[0]).lower(jnp.ones((4, 8)), jnp.ones((7, 8, 8))).compile()
    inside = [each for each in hlo.read(compiled.as_text()) if each.inside]
    assert inside and all(each.times == 7 for each in inside)


@pytest.mark.parametrize(("dtype", "shape", "size"), [
    ("f32", (2, 3), 24), ("bf16", (5,), 10), ("pred", (7,), 7), ("s4", (3,), 2), ("f8e4m3fn", (3,), 3), ("s32", (), 4),
])
def test_bytes(dtype, shape, size):
    assert hlo.array_bytes(dtype, shape) == size


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.read("nothing")
