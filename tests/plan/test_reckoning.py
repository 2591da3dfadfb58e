"""From what was compiled to bytes and seconds, on figures that can be worked out by hand; and the page."""

import pytest

from jaxrl_fp16.plan.page import advice, answer, write_plan
from jaxrl_fp16.plan.reckoning import at_best, carried_on, link, moved_in_step, needs_of, one_by_one, room, seconds_of
from jaxrl_fp16.plan.targets import GIB, get_target

H100X16 = get_target("h100x16")


def summary(temporary=2 * GIB, moved=(), layers=4, decode=None):
    return {"memory": {"arguments": 3 * GIB, "results": 3 * GIB, "donated": 2 * GIB, "temporary": temporary, "code": 0,
                       "total": 4 * GIB + temporary},
            "layers": layers, "moved": list(moved), "dots": ["f16 x f16 -> f32"], "decode": decode}


def moved(kind="all-gather", axes="fsdp", place="loop", times=10, size=10**9, group=16, hosts=2):
    return {"kind": kind, "axes": axes, "place": place, "times": times, "bytes": size, "group": group, "hosts": hosts,
            "arrays": [], "name": ""}


def facts(**changes):
    return {
        "layers": 4, "kv_heads": 2, "parameters": 10**9, "attention": "blockwise", "remat": True, "precision": "fp16",
        "rollout_precision": "fp16", "half": 2, "rows": 64, "columns": 512, "updates": 2, "scored": 1,
        "new_tokens": 100,
        "rounds": 2, "decodes in steps": False, "mesh": {"data": 1, "fsdp": 16, "tensor": 1}, "must_read": 3.352e9,
        "learner": {"policy": 12 * GIB, "policy parameters": 4 * GIB, "critic": GIB, "critic parameters": GIB // 2,
                    "reference": 0},
        "flops": {"prefill": 0.0, "decode": 16 * 989e12, "scorer": 16 * 989e12, "update": 16 * 989e12 * 2},
        "estimate": {"parameters": GIB}, **changes,
    }


def test_deeper_models_lie_on_the_line_through_two():
    few = summary(2 * GIB, [moved(times=2)], 2, {"kernels": 10, "bytes": 5, "moved": 4, "largest": 2, "cache": {}})
    more = summary(3 * GIB, [moved(times=4), moved("all-reduce", times=1)], 4,
                   {"kernels": 16, "bytes": 9, "moved": 8, "largest": 2, "cache": {}})
    found = carried_on(few, more, 40)
    assert found["memory"]["temporary"] == 21 * GIB and found["memory"]["arguments"] == 3 * GIB
    assert found["decode"] == {"kernels": 124, "bytes": 81, "moved": 80, "largest": 2, "cache": {}}
    step = moved_in_step({"scorer": found}, facts())
    assert step["scorer", "loop", "fsdp", "all-gather"] == 40e9
    assert step["scorer", "loop", "fsdp", "all-reduce"] == 1e9 + 18 * 1e9


def test_a_step_counts_calls_and_decode_steps():
    found = {"update": summary(moved=[moved(times=3)]),
             "sampler": summary(moved=[moved(place="decode", times=1), moved(place="earlier stage")])}
    assert moved_in_step(found, facts()) == {("update", "loop", "fsdp", "all-gather"): 6e9,
                                             ("sampler", "decode", "fsdp", "all-gather"): 200e9}


def test_seconds_by_each_limit():
    found = seconds_of("update", summary(moved=[moved()]), facts(), H100X16)
    # 10 GB twice a step, 15 of 16 parts from others, through 8 network cards of a host: 400 GB/s.
    assert found == pytest.approx({"compute": 4.0, "memory": 0.0, "wires": 20e9 * 15 / 16 / 400e9})
    decoding = summary(moved=[moved("all-reduce", "tensor", "decode", 1, 10**6, 4, 1)])
    found = seconds_of("sampler", decoding, facts(), H100X16)
    assert found == pytest.approx({"compute": 1.0, "memory": 200 * 1e-3, "wires": 200 * 2e6 * 3 / 4 / 450e9})
    assert at_best(found) == 1.0 and one_by_one(found) == 1.0 + found["wires"]


@pytest.mark.parametrize(("hosts", "members", "speed"), [(1, 8, 450e9), (2, 1, 50e9), (2, 8, 400e9), (16, 16, 450e9)])
def test_a_ring_uses_the_cards_of_all_its_devices(hosts, members, speed):
    assert link(H100X16.chip, hosts, members) == speed


def test_what_stays_on_a_device_beside_a_program():
    needs = needs_of("scorer", summary(), facts())
    assert needs == {"arguments": 3 * GIB, "temporary": 2 * GIB, "results and code": GIB, "other states": 9 * GIB}
    assert needs_of("update", summary(), facts())["other states"] == GIB
    assert needs_of("sampler", summary(), facts(**{"decodes in steps": True}))["other states"] == 13 * GIB
    assert room(H100X16) == pytest.approx(0.92 * 84_929_347_584) and room(get_target("v5e-16")) == 16e9


def test_the_answer_says_what_does_not_fit_and_what_to_change():
    large = {"update": summary(200 * GIB, [moved(times=10**5)]), "sampler": summary()}
    first, second, third = answer(large, facts(), H100X16)
    assert first.startswith("It does not fit: the update takes most, 205 GiB of the 72.8 GiB") and "16 H100" in first
    assert "the update takes most of it, and is bound by the wires" in second and "200.00 TB" in third
    said = " ".join(advice(large, facts(), H100X16))
    assert "The update is 132.2 GiB too large" in said and "training.microbatch_size" in said
    assert "waits for weights and gradients along fsdp" in said
    assert not list(advice({"scorer": summary()}, facts(), H100X16))
    assert next(answer({"scorer": summary()}, facts(), H100X16)).startswith("It fits: ")


def test_the_page_holds_every_part(tmp_path):
    found = {"sampler": summary(), "update": summary(moved=[moved()])}
    seconds = {"compute": 1, "memory": 0, "wires": 2}
    searched = {(1, 16, 1): {"needs": GIB, "micro": 8, "moved": 1e9, "seconds": seconds},
                (2, 8, 1): "the compiler ended"}
    page = write_plan(tmp_path / "p.html", "toy", found, facts(), H100X16, searched, ["It <ran> nowhere."]).read_text()
    for text in ("toy on h100x16", "It fits", "What to change", "1 x 16 x 1", "the compiler ended",
                 "It &lt;ran&gt; nowhere.", "NVIDIA", "other states", "<svg"):
        assert text in page
