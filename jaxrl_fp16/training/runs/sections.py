"""The sections of a run's configuration that no other module owns."""

import dataclasses
from typing import Annotated, Literal, Optional, get_type_hints

from annotated_types import Ge, Gt, Le, MinLen

from jaxrl_fp16.config import Doc
from jaxrl_fp16.models.attention import AttentionKind
from jaxrl_fp16.models.decoder import DecoderConfig
from jaxrl_fp16.objectives import PRESETS, AlgorithmConfig, PreferenceConfig
from jaxrl_fp16.precision import LossScaleConfig, get_policy
from jaxrl_fp16.training.updates.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    name: Annotated[str | None, Doc("first part of the run folder's name; null: the config file's")] = None
    dir: Annotated[str, Doc("where run folders are made")] = "runs"
    seed: Annotated[int, Ge(0), Doc("of weights, sampling and data order")] = 0
    stamp: Annotated[bool, Doc("the folder's name ends with the time; false: dir/name itself")] = True
    steps: Annotated[int, Ge(0), Doc("iterations")] = 100
    platform: Annotated[Literal["auto", "cpu", "gpu", "tpu"], Doc("auto: the best that JAX finds")] = "auto"
    compile_cache: Annotated[str | None, Doc("folder of compiled programs; null: none")] = "~/.cache/jaxrl_fp16"
    export: Annotated[bool, Doc("write the final weights as a Hugging Face folder, model/")] = True
    heartbeat_seconds: Annotated[
        int, Ge(1), Doc("of several processes: silence after which one counts as gone, and the others stop")
    ] = 60


def _optional_fields(cls):
    """The fields of a config class, each of which may also be null."""
    hints = get_type_hints(cls, include_extras=True).items()
    return [(name, Annotated[(Optional[hint.__origin__], *hint.__metadata__)], None) for name, hint in hints]


# `path`, or the fields of a DecoderConfig; all in one section.
ModelConfig = dataclasses.make_dataclass(
    "ModelConfig",
    [
        ("path", Annotated[str | None, Doc("a Hugging Face folder; null: random weights of the shape below")], None),
        ("tokenizer", Annotated[str | None, Doc("its folder; null: path's, or the task's characters")], None),
        ("attention", Annotated[AttentionKind, Doc("one for sampler, scorer and update")], "blockwise"),
        ("remat", Annotated[bool, Doc("keep only layer inputs for the backward pass")], True),
        *_optional_fields(DecoderConfig),
    ],
    frozen=True,
    namespace={"__doc__": "The model: a folder, or a shape to be filled at random."},
)

# A preset, and what differs from it.
AlgorithmSection = dataclasses.make_dataclass(
    "AlgorithmSection",
    [
        ("preset", Annotated[Literal[*PRESETS], Doc("the algorithm; fields left null are the preset's")], "grpo"),
        *(field for field in _optional_fields(AlgorithmConfig) if field[0] != "preset"),
    ],
    frozen=True,
    namespace={"__doc__": "The algorithm: a preset, and the fields of AlgorithmConfig that differ from it."},
)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    prompts_per_step: Annotated[int, Ge(1), Doc("prompts of an iteration; each gets group_size responses")] = 64
    minibatch_size: Annotated[int, Ge(1), Doc("rows of an optimizer step")] = 128
    microbatch_size: Annotated[int, Ge(1), Doc("rows in memory at once; divides minibatch_size")] = 8
    epochs: Annotated[int, Ge(1), Doc("passes over an iteration's rows")] = 1
    max_prompt_tokens: Annotated[int, Ge(1), Doc("longer prompts are set aside")] = 1024
    old_logprobs: Annotated[
        Literal["recompute", "rollout"], Doc("by the scorer, or the sampler's own")
    ] = "recompute"
    truncated: Annotated[
        Literal["keep", "zero", "mask"], Doc("a response cut by the length limit: as graded, reward 0, out of the loss")
    ] = "zero"
    reference: Annotated[
        Literal["device", "host"], Doc("where the KL term's reference waits: in device memory, or the host's")
    ] = "device"
    max_sampling_rounds: Annotated[
        int, Ge(1), Doc("with dynamic_sampling: batches sampled at most to fill a step with unequal groups")
    ] = 4
    max_skipped_steps: Annotated[int, Ge(1), Doc("optimizer steps skipped in a row before the run stops")] = 20
    stop_above: Annotated[
        dict[str, float], Doc("metrics that end the run when above, e.g. {mismatch/kl_k3: 0.1, kl: 5}; none: {}")
    ] = dataclasses.field(default_factory=dict)
    stage_seconds: Annotated[
        float | None, Gt(0),
        Doc("longer sampling with grading, learning, evaluating of a set or saving ends the run; null: no limit"),
    ] = 3600.0
    max_failed_rewards: Annotated[float, Ge(0), Le(1), Doc("share of rewards that may fail in a step")] = 0.05
    probe: Annotated[bool, Doc("`train` at learning rate 0: no weight moves, the mismatch is the set-up's own")] = False
    tokenisation_rows: Annotated[
        int, Ge(0), Doc("responses of a step that are decoded and encoded again for terms/tokenisation; 0: none")
    ] = 16


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised training on the task's solutions; before `train` where `steps` is not 0."""

    steps: Annotated[int, Ge(0), Doc("optimizer steps; 0: none")] = 0
    until_accuracy: Annotated[
        float | None, Gt(0), Le(1), Doc("a warm start ends when the first evaluation set reaches it; null: after steps")
    ] = None
    check_every: Annotated[int, Ge(1), Doc("steps between looks at that accuracy")] = 10
    batch_size: Annotated[int, Ge(1), Doc("rows of a step")] = 64
    microbatch_size: Annotated[int, Ge(1), Doc("rows in memory at once; divides batch_size")] = 64
    max_length: Annotated[int, Ge(2), Doc("tokens of prompt and solution; longer pairs are set aside")] = 512
    packing: Annotated[bool, Doc("several pairs share a row of max_length columns; the loss is the same")] = False
    optimizer: Annotated[OptimizerConfig, Doc("its own")] = OptimizerConfig(learning_rate=1e-5)


@dataclasses.dataclass(frozen=True)
class DPOConfig(PreferenceConfig):
    """Preference optimization on the task's pairs of responses; the reference is the model that it starts from."""

    steps: Annotated[int, Ge(1), Doc("optimizer steps")] = 100
    batch_size: Annotated[int, Ge(1), Doc("pairs of a step")] = 64
    microbatch_size: Annotated[int, Ge(1), Doc("pairs in memory at once; divides batch_size")] = 8
    max_length: Annotated[int, Ge(2), Doc("tokens of prompt and response; longer pairs are set aside")] = 1024
    optimizer: Annotated[OptimizerConfig, Doc("its own")] = OptimizerConfig(learning_rate=1e-6)


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    name: Annotated[str, Doc("heads its metrics: eval/NAME/accuracy")]
    path: Annotated[str | None, Doc("JSONL file; null: the task's held-out problems")] = None
    template: Annotated[str | None, Doc("null: the task's")] = None
    samples: Annotated[int, Ge(1), Doc("responses to each problem")] = 1
    temperature: Annotated[float, Ge(0), Doc("0: greedy")] = 0.0
    top_p: Annotated[float, Gt(0), Le(1), Doc("1: off")] = 1.0
    limit: Annotated[int | None, Ge(1), Doc("first problems only; null: all")] = None


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    every: Annotated[int, Ge(0), Doc("steps between evaluations; 0: none before the end")] = 0
    sets: Annotated[tuple[EvaluationSet, ...], Doc("what is evaluated")] = ()
    max_new_tokens: Annotated[int | None, Ge(1), Doc("null: as in sampling")] = None
    rows: Annotated[int, Ge(1), Doc("responses sampled at once")] = 256

    def __post_init__(self):
        names = [section.name for section in self.sets]
        if len(set(names)) < len(names) or any("/" in name for name in names):
            raise ValueError(f"sets are named {', '.join(names)}; allowed: different names without a slash")


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """PPO's critic; used where the advantage is `gae`."""

    path: Annotated[str | None, Doc("a Hugging Face folder for its body; null: a copy of the policy's")] = None
    precision: Annotated[str | None, Doc("its own, as `precision`; null: the run's")] = None
    loss_scale: Annotated[LossScaleConfig, Doc("its own")] = LossScaleConfig()
    optimizer: Annotated[OptimizerConfig, Doc("its own")] = OptimizerConfig(learning_rate=1e-5)
    warmup_steps: Annotated[int, Ge(0), Doc("first iterations, in which the critic alone learns")] = 0


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    prompts: Annotated[tuple[str, ...], Doc("problems, put into the template; none: the task's held-out ones")] = ()
    count: Annotated[int, Ge(1), Doc("how many of the task's problems")] = 4


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Which problems `filter` keeps; the defaults are the paper's (2510.26788)."""

    samples: Annotated[int, Ge(1), Doc("responses to each problem")] = 40
    low: Annotated[float, Ge(0), Le(1), Doc("smallest accuracy that is kept")] = 0.2
    high: Annotated[float, Ge(0), Le(1), Doc("largest")] = 0.8
    output: Annotated[str | None, Doc("JSONL file of the kept ones; null: filtered.jsonl in the run folder")] = None

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"low is {self.low}; allowed: at most high, {self.high}")


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """The runs that `compare` starts: each precision with each seed."""

    precisions: Annotated[tuple[str, ...], Doc("of the runs; short: --precisions A B")] = ("fp16", "bf16")
    rollout_precisions: Annotated[
        tuple[str, ...], Doc("each with each precision, for the ablation; none: the same as the run's")
    ] = ()
    seeds: Annotated[tuple[Annotated[int, Ge(0)], ...], Doc("none: run.seed alone; short: --seeds 0 1 2")] = ()
    jobs: Annotated[
        int | None, Ge(1), Doc("runs side by side; null: one on an accelerator, on a CPU one a core; short: --jobs")
    ] = None
    collapse: Annotated[
        float, Gt(0), Le(1), Doc("share of its peak by which the reward must fall, and stay, to have collapsed")
    ] = 0.25

    def __post_init__(self):
        for name in ("precisions", "rollout_precisions", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (name == "precisions" and not values):
                raise ValueError(f"{name} are {', '.join(map(str, values)) or 'none'}; allowed: one or more, each once")
        for name in (*self.precisions, *self.rollout_precisions):
            get_policy(name)


@dataclasses.dataclass(frozen=True)
class InfoConfig:
    """What `info` looks at."""

    rows: Annotated[int, Ge(1), Doc("problems, with their solutions or with sampled responses")] = 8
    max_new_tokens: Annotated[int, Ge(1), Doc("of a sampled response, where that is less than sampling's")] = 128
    output: Annotated[str | None, Doc("JSON file of all figures; null: the console alone")] = None


@dataclasses.dataclass(frozen=True)
class MismatchConfig:
    """What `mismatch` samples, scores and draws."""

    precisions: Annotated[tuple[str, ...], MinLen(1), Doc("each samples, and each scores what all sampled")] = (
        "fp16", "bf16",
    )
    reference: Annotated[str, Doc("the precision that stands in for the exact answer")] = "fp32"
    rollouts: Annotated[str | None, Doc("a folder of stored rollouts to read; null: sample")] = None
    prompts: Annotated[int | None, Ge(1), Doc("of the task's; null: training.prompts_per_step")] = None
    bins: Annotated[int, Ge(1), Doc("of a figure's axis at most")] = 12
    attribution: Annotated[bool, Doc("also by module, of the first responses; takes every activation's memory")] = False
