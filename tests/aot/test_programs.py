"""What the compilers of an H100 and of a TPU make of sampler, scorer and update: nothing runs.

Results are right whatever the layout: only here is it seen that devices would do each other's work.
"""

import functools
import math
import re

import jax
import pytest

from jaxrl_fp16.models import Decoder, DecoderConfig, LoraConfig, param_shapes
from jaxrl_fp16.plan.compilers import compile_program, find_compiler
from jaxrl_fp16.plan.targets import get_target
from jaxrl_fp16.training.safety.memory import trained_count

pytestmark = pytest.mark.aot

LAYERS, WIDTH, INNER, VOCAB, PROMPT, NEW, ROWS, MICRO = 2, 256, 512, 4096, 64, 256, 32, 8
COLUMNS = PROMPT + NEW
SHAPE = dict(family="qwen2", vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_layers=LAYERS,
             num_heads=4, num_kv_heads=2, head_dim=64, tie_embeddings=False)
PARAMETERS = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(Decoder(DecoderConfig(**SHAPE)))))
TARGETS = {"h100x8": ("fp16", (1, 4, 2)), "v5e:2x2": ("bf16", (1, 4, 1))}     # precision, mesh
HALF = {"fp16": "f16", "bf16": "bf16"}


@functools.cache
def compiled(name, target, mesh=None, micro=MICRO, rank=None, text=None):
    """What `summary_of` says of a program of the model, compiled for the target; rank: of adapters. text: a file for
    the program."""
    precision, usual = TARGETS[target]
    data, fsdp, tensor = mesh or usual
    config = {
        "precision": precision, "model": {**SHAPE, "attention": "blockwise"}, "task": {"name": "arithmetic"},
        "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor},
        "sampling": {"max_new_tokens": NEW, "group_size": 4}, "lora": {"rank": rank},
        "training": {"prompts_per_step": ROWS // 4, "minibatch_size": ROWS, "microbatch_size": micro,
                     "max_prompt_tokens": PROMPT},
    }
    return compile_program(config, get_target(target), name, text=text, seconds=300)


@pytest.fixture(params=TARGETS)
def target(request):
    return there(request.param)


def there(target):
    """`target`, where its compiler is installed; elsewhere the test is skipped."""
    try:
        find_compiler(get_target(target).chip.platform)
    except ValueError as error:
        pytest.skip(str(error))
    return target


def elements(each):
    """Of the largest array that a collective moves."""
    return max(math.prod(shape) for _, shape in each["arrays"])


def gathered_weights(moved):
    return [each for each in moved if each["kind"] == "all-gather" and elements(each) > ROWS * WIDTH]


@pytest.mark.parametrize("name", ["sampler", "scorer", "update"])
def test_matmuls_are_of_the_compute_dtype_and_summed_in_float32(target, name):
    half = HALF[TARGETS[target][0]]
    assert compiled(name, target)["dots"] == [f"{half} x {half} -> f32"]


@pytest.mark.parametrize("name", ["scorer", "update"])
def test_no_device_is_sent_all_rows(target, name):
    _, (data, fsdp, _) = TARGETS[target]
    all_rows = MICRO * COLUMNS * WIDTH
    activations = [each for each in compiled(name, target)["moved"]
                   for _, shape in each["arrays"] if COLUMNS in shape and math.prod(shape) > MICRO * COLUMNS]
    assert activations and max(elements(each) for each in activations) <= all_rows // (data * fsdp)


def test_sums_over_the_tensor_axis_of_a_layer():
    """Two forward, one of them again with remat, and two backward: of q, k and v together, of gate and up together."""
    moved = compiled("update", there("h100x8"))["moved"]
    layers = [each for each in moved if each["axes"] == "tensor" and each["times"] == LAYERS * ROWS // MICRO]
    assert sum(len(each["arrays"]) for each in layers if elements(each) > WIDTH) == 5
    assert {dtype for each in layers for dtype, _ in each["arrays"]} == {"f32"}


def test_the_head_crosses_once_a_microbatch(target):
    moved, tensor = compiled("update", target)["moved"], TARGETS[target][1][2]
    head, half = [VOCAB // tensor, WIDTH], HALF[TARGETS[target][0]]
    gathered = sum(each["times"] for each in moved if [half, head] in each["arrays"])
    scattered = sum(each["times"] for each in moved if each["kind"] == "reduce-scatter"
                    and any(shape[0] == head[0] for _, shape in each["arrays"]))
    assert gathered == scattered == ROWS // MICRO
    assert not any(["f32", head] in each["arrays"] for each in moved)


def test_bytes_that_an_update_moves(target):
    """Weights there and again for the backward pass in the compute dtype, gradients back in float32; activations."""
    _, (_, fsdp, tensor) = TARGETS[target]
    moved = compiled("update", target)["moved"]
    weights = sum(each["bytes"] * each["times"] for each in moved if each["axes"] == "fsdp")
    activation = 4 * MICRO // fsdp * COLUMNS * WIDTH
    assert weights <= 1.1 * (ROWS // MICRO) * ((2 + 2 + 4) * PARAMETERS // tensor + 2 * activation)


def test_a_state_is_donated_whole(target):
    memory, chips = compiled("update", target)["memory"], get_target(target).chips
    assert memory["donated"] >= 12 * PARAMETERS / chips
    assert memory["results"] - memory["donated"] < 0.02 * memory["results"] + 4 * ROWS * COLUMNS


def test_a_decode_step_moves_nothing_that_grows_with_the_weights(target):
    _, (_, fsdp, tensor) = TARGETS[target]
    decode = compiled("sampler", target)["decode"]
    rows = ROWS // fsdp
    assert decode["largest"] <= (4 * rows * WIDTH if tensor > 1 else 0)
    # Two sums a layer, the embedding, and what a draw needs of the vocabulary's pieces.
    assert decode["moved"] <= (4 * rows * (WIDTH * (2 * LAYERS + 1) + 4 * VOCAB // 64) if tensor > 1 else 0)


def test_a_decode_step_writes_its_cache_in_place(target):
    assert compiled("sampler", target)["decode"]["cache"] == {"written": 2 * LAYERS, "others": []}


def test_the_decoding_weights_are_gathered_before_the_loop(target):
    moved = compiled("sampler", target)["moved"]
    assert gathered_weights(moved)
    assert all(each["place"] != "decode" for each in gathered_weights(moved))


def test_gradients_of_copies_cross_once_a_step():
    target = there("h100x8")
    found = {micro: compiled("update", target, (4, 2, 1), micro)["moved"] for micro in (MICRO, ROWS)}
    summed = {micro: [each for each in moved if "data" in each["axes"] and each["bytes"] > 2**16]
              for micro, moved in found.items()}
    for each in summed.values():
        assert sum(one["times"] for one in each) == len(each) and {one["axes"] for one in each} == {"data"}
        assert {dtype for one in each for dtype, _ in one["arrays"]} == {"f32"}
    # A copy's metrics, a few numbers for each microbatch, go along.
    sizes = [sum(one["bytes"] for one in each) for each in summed.values()]
    assert sizes == pytest.approx([4 * PARAMETERS / 2] * 2, rel=0.005)


# -- adapters beside frozen weights ----------------------------------------------------------------------


RANK = 8
ADAPTERS = trained_count(Decoder(DecoderConfig(**SHAPE), lora=LoraConfig(rank=RANK)))


def on_a_device(text, dtype):
    """Shapes that a program holds in a dtype, the length of 1 of a layer's slice left out."""
    found = {tuple(map(int, each.split(","))) for each in re.findall(rf"\b{dtype}\[([\d,]+)\]", text)}
    return {tuple(size for size in shape if size > 1) for shape in found}


def test_an_update_of_adapters_has_no_gradient_of_the_base(tmp_path):
    target, text = there("h100x8"), tmp_path / "update.txt"
    found = compiled("update", target, (4, 2, 1), rank=RANK, text=str(text))
    assert found["dots"] == ["f16 x f16 -> f32"]
    # Kernels of the MLP, of all layers or one, whole and as the mesh divides them; and the head.
    kernels = [(WIDTH, INNER), (WIDTH // 2, INNER), (WIDTH, INNER // 2), (INNER, WIDTH), (INNER, WIDTH // 2)]
    base = {(*layers, *shape) for layers in ((), (LAYERS,)) for shape in kernels if shape != (WIDTH, WIDTH)}
    base |= {(VOCAB, WIDTH), (VOCAB, WIDTH // 2)}
    assert len(base & on_a_device(text.read_text(), "f16")) > 3
    assert not base & on_a_device(text.read_text(), "f32")
    # What crosses the copies of the model is the adapters' gradient, once; weights are gathered in the compute dtype.
    summed = [each for each in found["moved"] if "data" in each["axes"] and each["bytes"] > 2**12]
    assert sum(each["times"] for each in summed) == len(summed) > 0
    assert 2 * ADAPTERS < sum(each["bytes"] for each in summed) < 4 * ADAPTERS     # B is not divided by fsdp
    back = [each for each in found["moved"] if each["kind"] == "reduce-scatter"]
    assert all(elements(each) <= ADAPTERS / LAYERS for each in back)
    gathered = [one for each in gathered_weights(found["moved"]) for one in each["arrays"]]
    assert {dtype for dtype, shape in gathered if math.prod(shape) > ROWS * WIDTH} == {"f16"}
    memory = found["memory"]
    assert memory["donated"] <= 12 * ADAPTERS < 2 * PARAMETERS / 2 < memory["arguments"] < 3 * PARAMETERS / 2


def test_a_decode_step_with_adapters_moves_nothing_that_grows_with_the_weights():
    """Over the tensor axis of a layer also what two adapters make of their inputs, a few numbers a row."""
    found = compiled("sampler", there("h100x8"), rank=RANK)
    rows, decode = ROWS // 4, found["decode"]
    assert found["dots"] == ["f16 x f16 -> f32"] and decode["largest"] <= 4 * rows * (WIDTH + RANK)
    assert decode["cache"] == {"written": 2 * LAYERS, "others": []}
    assert all(each["place"] != "decode" for each in gathered_weights(found["moved"]))
