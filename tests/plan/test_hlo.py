"""A compiled program's instructions, and how often they run."""

import jax
from jax import lax
import jax.numpy as jnp
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


@pytest.mark.parametrize(("text", "groups"), [
    ("replica_groups={{0,1},{2,3}}, to_apply=%add", [[0, 1], [2, 3]]),
    ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("replica_groups=[2,2]<=[4], dimensions={1}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
])
def test_which_devices_take_part(text, groups):
    line = f"  %r = f32[8]{{0}} all-reduce(%p), {text}"
    program = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n{line}\n}}\n"
    (found,) = hlo.collectives(hlo.read(program))
    assert found.groups.tolist() == groups


# As a TPU's compiler writes them: one gather in two fusions, a loop whose condition has its count, a divided sum.
TPU = """HloModule jit_f, is_scheduled=true

%begin (p: bf16[2,4]) -> bf16[8,4] {
  %p = bf16[2,4]{1,0} parameter(0)
  ROOT %gather.1 = bf16[8,4]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%finish (p: bf16[2,4]) -> bf16[8,4] {
  %p = bf16[2,4]{1,0} parameter(0)
  ROOT %gather.2 = bf16[8,4]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%all-reduce-scatter.1 (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %sum = f32[8,4]{1,0} all-reduce(%p), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = f32[2,4]{1,0} dynamic-slice(%sum, %p), dynamic_slice_sizes={2,4}
}

%condition (c: (s32[], bf16[2,4])) -> pred[] {
  %c = (s32[], bf16[2,4]{1,0}) parameter(0)
  %count = s32[]{:T(128)} constant(6)
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%at, %count), direction=LT
}

%body (c: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %c = (s32[], bf16[2,4]{1,0}) parameter(0)
  %x = bf16[2,4]{1,0} get-tuple-element(%c), index=1
  %a = bf16[8,4]{1,0} fusion(%x), kind=kCustom, calls=%begin
  %b = bf16[8,4]{1,0} fusion(%x), kind=kCustom, calls=%finish
  %g = f32[8,4]{1,0} convert(%b)
  %d = f32[2,4]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[], bf16[2,4]{1,0}) tuple(%at, %x)
}

ENTRY %main (p: bf16[2,4]) -> (s32[], bf16[2,4]) {
  %p = bf16[2,4]{1,0} parameter(0)
  ROOT %loop = (s32[], bf16[2,4]{1,0}) while(%p), condition=%condition, body=%body
}
"""


def test_a_tpus_collectives_are_inside_of_fusions():
    found = [(each.opcode, each.times, each.arrays, each.moved) for each in hlo.collectives(hlo.read(TPU))]
    assert found == [("all-gather", 6, (("bf16", (8, 4)),), 64), ("reduce-scatter", 6, (("f32", (2, 4)),), 128)]


def test_dtypes_of_matmuls():
    compiled = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32)).lower(
        jnp.ones((4, 8)), jnp.ones((8, 8))).compile()
    assert set(hlo.dots(compiled.as_text())) == {("f32", "f32", "f32")}
    gemm = """ENTRY %main (a: f16[4,8], b: f16[8,8]) -> f32[4,8] {
  %a = f16[4,8]{1,0} parameter(0)
  %b = f16[8,8]{1,0} parameter(1)
  ROOT %c = f32[4,8]{1,0} custom-call(%a, %b), custom_call_target="__cublas$gemm"
}
"""
    assert hlo.dots(gemm) == [("f16", "f16", "f32")]
