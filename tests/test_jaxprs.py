"""Every matmul of every program, forward and backward, read off its jaxpr.

The jaxpr and not the compiled program: XLA's CPU backend runs float16 matmuls
in float32 whatever the program says.
"""

import ast
from collections import Counter
from pathlib import Path

import jax
from jax.extend import core
import jax.numpy as jnp
import optax
import pytest

import jaxrl_fp16
from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.models import Critic, Decoder, DecoderConfig, attention, layers, param_shapes
from jaxrl_fp16.objectives import PreferenceConfig, get_algorithm
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler
from jaxrl_fp16.training.updates import (
    PreferencePairs, init_train_state, make_dpo_update, make_update, make_value_update,
)
from jaxrl_fp16.training.updates.sft_update import SFTRows, make_sft_update
from jaxrl_fp16.types import Batch

PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
KINDS = ("blockwise", "plain")
LAYERS, ROWS, PROMPT, NEW = 3, 4, 10, 6
CONFIG = DecoderConfig(family="qwen2", vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=LAYERS,
                       num_heads=4, num_kv_heads=2, head_dim=4, tie_embeddings=True)
PROJECTIONS = 7  # q, k, v, o, gate, up, down


# -- walking a jaxpr ----------------------------------------------------------------------------


def equations(jaxpr):
    """Every equation, those of inner jaxprs (scan, while, cond, jit, custom_vjp, remat, ...) too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_jaxprs(list(equation.params.values())):
            yield from equations(inner)


def inner_jaxprs(x):
    if isinstance(x, core.ClosedJaxpr):
        yield x.jaxpr
    elif isinstance(x, core.Jaxpr):
        yield x
    elif isinstance(x, (list, tuple)):
        for item in x:
            yield from inner_jaxprs(item)


def dtypes(variables):
    return [variable.aval.dtype for variable in variables]


def matmul_faults(jaxpr, compute):
    """(how many matmuls there are, what is wrong with them)."""
    count, faults = 0, []
    for equation in equations(jaxpr):
        name = equation.primitive.name
        if name == "dot_general":
            count += 1
            asked, out = equation.params["preferred_element_type"], equation.outvars[0].aval.dtype
            if dtypes(equation.invars) != [compute, compute] or asked != jnp.float32 or out != jnp.float32:
                faults.append(f"{dtypes(equation.invars)} -> {asked}, {out}")
            if compute == jnp.float32 and "HIGHEST" not in str(equation.params["precision"]):
                faults.append(f"float32 at precision {equation.params['precision']}")
        elif name.startswith(("conv_", "ragged_dot", "scaled_dot", "dot_product_attention", "custom_call")):
            faults.append(name)
    return count, faults


# -- the programs ---------------------------------------------------------------------------------


def shapes(rows=ROWS, columns=PROMPT + NEW):
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    grid = (rows, columns)
    batch = Batch(
        tokens=array(jnp.int32, *grid), mask=array(bool, *grid), response_mask=array(bool, *grid),
        **{name: array(jnp.float32, *grid)
           for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "returns")},
        advantages=array(jnp.float32, rows),
    )
    return batch, jax.eval_shape(lambda: jax.random.key(0))


def decoder(kind):
    return Decoder(CONFIG, attention=kind)


def sampler_jaxpr(precision, kind):
    batch, key = shapes(columns=PROMPT)
    config = SamplingConfig(max_new_tokens=NEW, group_size=2, top_p=0.9)
    sample = make_sampler(decoder(kind), precision.policy, config, eos_id=1, pad_id=0)
    return jax.make_jaxpr(sample)(param_shapes(decoder(kind)), batch.tokens, batch.mask, key).jaxpr


def scorer_jaxpr(precision, kind):
    batch, _ = shapes()
    score = lambda *args: token_logprobs(decoder(kind), *args, policy=precision.policy)
    return jax.make_jaxpr(score)(param_shapes(decoder(kind)), batch.tokens, batch.mask).jaxpr


def update_jaxpr(precision, kind):
    algorithm = get_algorithm("grpo_token_tis", kl_coef=0.1, entropy_coef=0.01)
    return trained_jaxpr(make_update, decoder(kind), precision, algorithm)


def value_jaxpr(precision, kind):
    return trained_jaxpr(make_value_update, Critic(decoder(kind)), precision, get_algorithm("ppo"))


def packed_jaxpr(precision, kind):
    """A supervised step on packed rows."""
    batch, _ = shapes()
    segments = jax.ShapeDtypeStruct(batch.tokens.shape, jnp.int32)
    make = lambda model, policy, _, optimizer, **settings: make_sft_update(model, policy, optimizer, **settings)
    pairs = SFTRows(batch.tokens, batch.mask, batch.response_mask, segments)
    return trained_jaxpr(make, decoder(kind), precision, None, pairs)


def dpo_jaxpr(precision, kind):
    tokens, mask, logprobs = (
        jax.ShapeDtypeStruct((ROWS, 2, PROMPT + NEW), dtype) for dtype in (jnp.int32, bool, jnp.float32)
    )
    pairs = PreferencePairs(tokens, mask, mask, logprobs)
    return trained_jaxpr(make_dpo_update, decoder(kind), precision, PreferenceConfig(), pairs)


def trained_jaxpr(make, model, precision, algorithm, other=None):
    batch, key = shapes()
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    update = make(model, precision.policy, algorithm, optimizer, microbatch_size=2)
    start = lambda params, key: init_train_state(params, optimizer, precision.loss_scale, key)
    return jax.make_jaxpr(update)(jax.eval_shape(start, param_shapes(model), key), other or batch).jaxpr


# name -> (its jaxpr, how many matmuls are in it, given attention's: `attended` forward, `grad` backward)
PROGRAMS = {
    # The prefill is one scanned layer and a head, of which the first column is drawn. The decode loop, one for
    # responses as short as these, is a layer after the other and a head.
    "sampler": (sampler_jaxpr, lambda attended, _: (PROJECTIONS + attended) * (1 + LAYERS) + 2),
    "scorer": (scorer_jaxpr, lambda attended, _: PROJECTIONS + attended + 1),
    # Forward; once more under remat, where nothing needs the result of `down`; two for each backward.
    # The head: forward, two backward; the logits of so few columns are kept.
    "update": (update_jaxpr, lambda attended, grad: (PROJECTIONS + attended) + (PROJECTIONS - 1 + attended)
               + 2 * PROJECTIONS + grad + 3),
    "packed": (packed_jaxpr, lambda attended, grad: PROGRAMS["update"][1](attended, grad)),
    "dpo": (dpo_jaxpr, lambda attended, grad: PROGRAMS["update"][1](attended, grad)),
    # The critic's head is a projection that is not computed again.
    "value": (value_jaxpr, lambda attended, grad: (PROJECTIONS + attended) + (PROJECTIONS - 1 + attended)
              + 2 * PROJECTIONS + grad + 3),
}
# Scores and mixing; backward each has two, and blockwise makes the scores again.
ATTENTION_MATMULS = {"blockwise": (2, 5), "plain": (2, 4)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_matmul_takes_the_compute_dtype_and_accumulates_in_float32(program, name, kind):
    jaxpr, expected = PROGRAMS[program]
    count, faults = matmul_faults(jaxpr(get_precision(name), kind), jnp.dtype(PRECISIONS[name]))
    assert not faults
    assert count == expected(*ATTENTION_MATMULS[kind])


# Sums, exponentials and their kind. `max`, comparisons and moves of data round nothing.
FLOAT32_ONLY = {
    "exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "sqrt", "rsqrt", "sin", "cos", "div", "pow",
    "integer_pow", "square", "reduce_sum", "cumsum", "cumlogsumexp", "scatter-add", "scatter_add",
}


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_norms_softmaxes_sums_and_scatters_are_float32(program, name):
    compute = jnp.dtype(PRECISIONS[name])
    found = Counter()
    for equation in equations(PROGRAMS[program][0](get_precision(name), "blockwise")):
        if equation.primitive.name in FLOAT32_ONLY:
            found[equation.primitive.name] += 1
            assert compute not in dtypes([*equation.invars, *equation.outvars]), equation
    assert {"exp", "log", "sqrt", "reduce_sum"} <= set(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRECISIONS)
def test_the_decode_loop_carries_the_cache_in_the_compute_dtype(name, kind):
    stored = jnp.dtype("uint16" if name == "bf16" else PRECISIONS[name])  # bfloat16 is kept as its bits
    slots = -(-(PROMPT + NEW) // attention.BLOCK) * attention.BLOCK
    rows, width = (2 * ROWS, CONFIG.num_kv_heads), CONFIG.head_dim
    blocks = slots // attention.BLOCK, width, attention.BLOCK
    shapes = (*rows, *blocks), (*rows, slots, width)  # keys, values
    carries = [
        [variable.aval.dtype for variable in equation.outvars if variable.aval.shape in shapes]
        for equation in equations(sampler_jaxpr(get_precision(name), kind))
        if equation.primitive.name == "while"
    ]
    assert [carry for carry in carries if carry] == [[stored] * 2 * LAYERS]


# -- the walk itself ----------------------------------------------------------------------------

HALF = jnp.float16


def faults_of(function, *arrays, compute=HALF):
    return matmul_faults(jax.make_jaxpr(function)(*arrays).jaxpr, jnp.dtype(compute))


def in_scan(f):
    return lambda a, b: jax.lax.scan(lambda carry, _: (carry, f(a, b)), 0, None, length=2)[1]


def with_vjp(f):
    f = jax.custom_vjp(f)
    f.defvjp(lambda a, b: (f(a, b), (a, b)), lambda saved, _: saved)
    return f


def with_jvp(f):
    f = jax.custom_jvp(f)
    f.defjvp(lambda primals, tangents: (f(*primals), f(*tangents)))
    return f


WRAPPERS = {
    "jit": jax.jit,
    "scan": in_scan,
    "map": lambda f: lambda a, b: jax.lax.map(lambda x: f(x, b), a[None]),
    "while": lambda f: lambda a, b: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: f(a, b), f(a, b)),
    "cond": lambda f: lambda a, b: jax.lax.cond(a[0, 0] > 0, f, lambda a, b: f(b, a), a, b),
    "remat": jax.checkpoint,
    "custom_vjp": with_vjp,
    "custom_jvp": with_jvp,
    "vmap": lambda f: lambda a, b: jax.vmap(f)(a[None], b[None]),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("wrong", [
    lambda a, b: a.astype(jnp.float32) @ b.astype(jnp.float32),
    lambda a, b: a @ b,
    lambda a, b: jnp.matmul(a.astype(jnp.float32), b, preferred_element_type=jnp.float32),
], ids=["upcast", "downcast", "mixed"])
def test_a_wrong_matmul_is_seen_wherever_it_stands(wrong, wrapper):
    a = jnp.ones((4, 4), HALF)
    right = lambda a, b: layers.matmul("ij,jk->ik", a, b)
    count, faults = faults_of(WRAPPERS[wrapper](right), a, a)
    assert count and not faults
    count, faults = faults_of(WRAPPERS[wrapper](wrong), a, a)
    assert count and faults


def test_a_fault_of_the_backward_pass_alone_is_seen():
    a = jnp.ones((4, 4), HALF)
    wrong = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).sum()
    assert faults_of(wrong, a, a) == (1, [])
    count, faults = faults_of(jax.grad(wrong, (0, 1)), a, a)
    assert count == 3 and len(faults) == 2


def test_a_convolution_is_seen():
    x = jnp.ones((1, 1, 8), HALF)
    _, faults = faults_of(lambda x: jax.lax.conv(x, x, (1,), "VALID"), x)
    assert faults == ["conv_general_dilated"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("wrong", ["float32", "bfloat16"])
def test_a_cast_in_a_real_program_is_seen(monkeypatch, program, kind, wrong):
    """One spec of the model's own matmul in another dtype: a projection forward."""
    original = layers._einsum

    def other(spec, a, b):
        if spec == "btd,df->btf":
            a, b = a.astype(wrong), b.astype(wrong)
        return original(spec, a, b)

    monkeypatch.setattr(layers, "_einsum", other)
    jax.clear_caches()  # a trace of the unpatched matmul would be found again
    _, faults = matmul_faults(PROGRAMS[program][0](get_precision("fp16"), kind), jnp.dtype(HALF))
    jax.clear_caches()
    assert faults


# -- one place casts ------------------------------------------------------------------------------

PACKAGE = Path(jaxrl_fp16.__file__).parent
NUMERICS = ("forward.py", "masking.py", "models/**/*.py", "sampling/*.py", "objectives/*.py",
            *(f"training/updates/{name}.py" for name in ("step", "policy_update", "critic_update")))


def functions_with(files, matches):
    """`file: function` of every function in which `matches(node)` holds of some node of the syntax tree."""
    return {
        f"{path.relative_to(PACKAGE)}: {function.name}"
        for pattern in files for path in PACKAGE.glob(pattern)
        for function in ast.walk(ast.parse(path.read_text())) if isinstance(function, ast.FunctionDef)
        if any(matches(node) for node in ast.walk(function))
    }


def names_attribute(*names):
    return lambda node: isinstance(node, ast.Attribute) and node.attr in names


def casts_to_compute(node):
    """jmp's own cast, or a cast by JAX's or NumPy's means to the policy's compute dtype."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    to_compute = any(names_attribute("compute_dtype")(part) for part in ast.walk(node))
    casts = node.func.attr in ("astype", "asarray", "array", "convert_element_type")
    return node.func.attr == "cast_to_compute" or casts and to_compute


def test_parameters_are_cast_in_one_place():
    names = ("cast_to_compute", "_cast_adapted", "cast_kernels", "cast", "cast_variables")
    casting = {f"forward.py: {name}" for name in names}
    assert functions_with(["**/*.py"], casts_to_compute) == casting
    # Beside them only what hands the dtype to the module, for its residual stream.
    reading = functions_with(NUMERICS, names_attribute("compute_dtype"))
    # And what rounds a base beside adapters, once, before any program.
    rounding = {"models/adapters.py: init_lora", "models/hf/adapter_folders.py: load_adapter"}
    assert reading == casting | rounding | {"forward.py: in_compute_dtype"}


def test_no_program_names_a_half_dtype():
    """Dtypes come from the policy. bfloat16 is named where a cache stores its bits."""
    half = names_attribute("float16", "bfloat16")
    assert functions_with(NUMERICS, half) == {"models/attention.py: store"}
