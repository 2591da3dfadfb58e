"""Compiles one program for a target in a process of its own, since a compiler may end the process that it runs in.

    python -m jaxrl_fp16.plan.child < REQUEST.json

REQUEST: `config` (a mapping), `target`, `program`, `layers` (null: all), `text` (null, or a file for the optimised
HLO). The last line of what it prints is `summary_of`'s mapping as JSON, with `facts` of the whole model, or
`{"refused": why}`. Without a `program` nothing is compiled.
"""

import json
from pathlib import Path
import sys
import time

from jax.experimental import topologies

from jaxrl_fp16.config import ConfigError, parse_config
from jaxrl_fp16.plan.facts import facts_of
from jaxrl_fp16.plan.programs import lowered, with_layers
from jaxrl_fp16.plan.summary import summary_of
from jaxrl_fp16.plan.targets import description_of, get_target
from jaxrl_fp16.training.runs.positions import check_positions
from jaxrl_fp16.training.runs.run_config import Config
from jaxrl_fp16.training.runs.setup import make_model, set_up_for


def devices_of(target):
    """The devices of a Target, as the compiler of its kind describes them."""
    if target.chip.platform == "tpu":
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{target.chip.name}:{target.topology}")
    else:
        found = topologies.get_topology_desc(
            platform="cuda", target_config=description_of(target.chip), topology=target.topology)
    return found.devices


def answer(request):
    """What the request's program compiles to."""
    target, start = get_target(request["target"]), time.process_time()
    try:
        setup = set_up_for(parse_config(Config, request["config"], "config"), target.chip.platform, devices_of(target))
        whole = make_model(setup)
        check_positions(setup.config, "plan", whole.config.max_positions)
        facts = facts_of(setup, whole)
    except (ConfigError, ValueError) as error:
        return {"refused": str(error)}
    if request["program"] is None:
        return {"facts": facts}
    model = with_layers(whole, request["layers"])
    compiled = lowered(setup, model, request["program"]).compile()
    text = compiled.as_text()
    if request["text"] is not None:
        Path(request["text"]).write_text(text)
    return {**summary_of(compiled, text, setup, model), "facts": facts, "seconds": time.process_time() - start}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
