"""Names of machines, and the meshes that are looked at."""

import math

import pytest

from jaxrl_fp16.plan.meshes import LOOKED_AT, meshes_for, microbatch_for
from jaxrl_fp16.plan.targets import ACCELERATORS, GRIDS, description_of, get_target


@pytest.mark.parametrize(("name", "chips", "near", "topology"), [
    ("h100x1", 1, 1, "1x1x1"), ("h100x8", 8, 8, "1x1x8"), ("h100x128", 128, 8, "1x16x8"), ("h200x4", 4, 4, "1x1x4"),
    ("h100:1x4x8", 32, 8, "1x4x8"), ("v5e-16", 16, 16, "4x4"), ("v5p-256", 128, 128, "4x4x8"),
    ("v5p:2x2x1", 4, 4, "2x2x1"), ("v6e-8", 8, 8, "2x4"), ("v5e:2x2", 4, 4, "2x2"),
])
def test_a_name_says_chips_and_how_they_are_connected(name, chips, near, topology):
    target = get_target(name)
    assert (target.chips, target.near_chips, target.topology) == (chips, near, topology)
    assert str(chips) in target.said


@pytest.mark.parametrize("name", [
    "", "h100", "h100-8", "h100x0", "h100x12", "a100x8", "v5ex16", "v5e-3", "v5p-4", "v5e:2x2x2", "h100:4x8",
    "v5p:2x0x2",
    "h100x8x", "H100x8",
])
def test_other_names_are_refused_with_what_is_allowed(name):
    with pytest.raises(ValueError, match=f"target '{name}'.* allowed: "):
        get_target(name)


def test_slices_have_the_chips_of_their_names():
    for kind, grids in GRIDS.items():
        cores = 2 if kind == "v5p" else 1
        assert all(math.prod(map(int, grid.split("x"))) * cores == number for number, grid in grids.items())


def test_a_description_is_of_the_card():
    text = description_of(ACCELERATORS["h200"])
    assert "device_memory_size: 150754820096" in text and "memory_bandwidth: 4800000000000" in text
    assert "device_memory_size: 84929347584" in description_of(ACCELERATORS["h100"])


def test_meshes_divide_the_rows_and_keep_tensor_near():
    found = meshes_for(128, 8, (1, 128, 1), (256, 128), 8)
    assert found[0] == (1, 128, 1) and len(found) == len(set(found)) == LOOKED_AT
    assert all(math.prod(mesh) == 128 and mesh[2] <= 8 for mesh in found)
    assert meshes_for(8, 8, (8, 1, 1), (8, 4), 2) == [(8, 1, 1), (1, 4, 2)]
    assert meshes_for(1, 1, (1, 1, 1), (8, 4), 2) == [(1, 1, 1)]


@pytest.mark.parametrize(("mesh", "own", "rows"), [
    ((1, 128, 1), 128, 128), ((1, 32, 4), 128, 128), ((2, 64, 1), 8, 128), ((1, 4, 2), 6, 4),
])
def test_rows_at_once_are_those_that_a_mesh_divides(mesh, own, rows):
    assert microbatch_for(mesh, own, 256) == rows
