"""Sampler or update of the checkout that `tree` names, on the model and the rows of the scripts above here."""

from pathlib import Path
import sys

from turns import Turns

turns = Turns()
given = turns.settings
sys.path[:0] = [given["tree"], str(Path(__file__).parents[1])]

import jaxrl_fp16  # noqa: E402
import sampler  # noqa: E402
import update  # noqa: E402
from workload import MODEL, make_full_batch, make_params, make_prompts  # noqa: E402

assert Path(jaxrl_fp16.__file__).is_relative_to(given["tree"]), jaxrl_fp16.__file__
params = make_params()
if given["part"] == "sampler":
    run = sampler.ours(MODEL, given["precision"], params, make_prompts(given["rows"]), given["tokens"])
else:
    model, batch = MODEL.clone(remat=given["part"] == "update"), make_full_batch(given["rows"], given["tokens"])
    run = update.ours(model, given["precision"], params, batch, microbatch_size=given["microbatch"])
while True:
    turns.start()
    turns.end(run())
