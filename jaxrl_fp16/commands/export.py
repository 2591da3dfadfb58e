"""`export`: a checkpoint as a Hugging Face folder."""

from jaxrl_fp16.config import ConfigError
from jaxrl_fp16.models.frozen import base_of
from jaxrl_fp16.objectives import needs_critic, needs_reference
from jaxrl_fp16.training.runs.learner import Learner, make_learner
from jaxrl_fp16.training.runs.run import open_run
from jaxrl_fp16.training.runs.run_config import resolve_algorithm
from jaxrl_fp16.training.runs.setup import lora_of


def run_export(config):
    """Writes the newest sound checkpoint of `resume` as RUN_FOLDER/model; of adapters as RUN_FOLDER/adapter, and with
    `lora.merge` as both."""
    if config.resume is None:
        raise ConfigError("export needs --resume RUN_FOLDER, the run whose checkpoint is to be exported")
    merge, adapted = config.lora.merge, lora_of(config) is not None
    if merge and (not adapted or config.model.path is None):
        why = "the run has no folder of the weights that they are added to" if adapted else "the run has no adapters"
        raise ConfigError(f"lora.merge is true and {why}; allowed: false, or adapters with model.path")
    algorithm = resolve_algorithm(config)
    others = dict(reference=needs_reference(algorithm), critic=needs_critic(algorithm))
    with open_run(config, None, **others) as (run, params):
        template = make_learner(run, algorithm, params)
        # What was saved depends on the command too: `sft` keeps the policy alone, and `dpo` always a reference.
        saved = template.replace(reference=base_of(template.sampling_params)).saved()
        kept = {name: part if name == "policy" or run.checkpoints.holds(name) else None for name, part in saved.items()}
        found, _, step = run.checkpoints.restore(kept, _chosen(run))
        run.log.say(f"the checkpoint of step {step}")
        run.export(Learner.of_saved(found).sampling_params, merge)
    return 0


def _chosen(run):
    """The step that `checkpoint.export` asks for; None: the newest sound one."""
    section = run.config.checkpoint
    if section.export == "latest":
        return None
    best = run.checkpoints.best()
    if best is None:
        raise ConfigError(f"checkpoint.export is 'best' and no checkpoint of {run.folder} has a {section.best!r}; "
                          "allowed: latest")
    return best
