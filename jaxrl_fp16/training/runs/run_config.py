"""The configuration of a run: the modules' own dataclasses, assembled."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, Optional, get_type_hints

from annotated_types import Ge, Gt, Le, MinLen

from jaxrl_fp16.config import Doc
from jaxrl_fp16.logs import LoggingConfig
from jaxrl_fp16.models.attention import PACKABLE, AttentionKind
from jaxrl_fp16.models.decoder import DecoderConfig
from jaxrl_fp16.models.numerics import NumericsConfig
from jaxrl_fp16.objectives import (
    PRESETS, AlgorithmConfig, PreferenceConfig, check_algorithm, get_algorithm, overlong_zone,
)
from jaxrl_fp16.parallel import MeshConfig, row_shards
from jaxrl_fp16.precision import LossScaleConfig, get_policy
from jaxrl_fp16.sampling import SamplingConfig
from jaxrl_fp16.tasks import TaskConfig
from jaxrl_fp16.telemetry import TelemetryConfig
from jaxrl_fp16.training.checkpoints.checkpoint import CheckpointConfig
from jaxrl_fp16.training.updates.optimizer import OptimizerConfig

# Of a resumed run these may differ from what it was started with: how long, how seen, on what.
MAY_CHANGE = ("run.steps", "sft.steps", "dpo.steps", "run.dir", "run.compile_cache", "run.export", "logging",
              "checkpoint", "evaluation", "mesh", "resume", "training.reference", "training.tokenisation_rows",
              "generate", "telemetry", "info", "filter.low", "filter.high", "filter.output", "compare.jobs",
              "mismatch", "task.workers", "task.deadline_seconds", "task.batch_seconds", "task.memory_mb",
              "training.stage_seconds", "training.stop_above", "run.heartbeat_seconds")


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


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a command reads."""

    precision: Annotated[str, Doc("auto, fp16, bf16, fp32 or params=float32,compute=DTYPE,output=DTYPE")] = "auto"
    rollout_precision: Annotated[str | None, Doc("of the sampler alone, for the ablation; null: precision")] = None
    platform: Annotated[Literal["auto", "cpu", "gpu", "tpu"] | None, Doc("short for run.platform")] = None
    resume: Annotated[str | None, Doc("a run folder to go on with")] = None
    run: RunConfig = RunConfig()
    loss_scale: LossScaleConfig = LossScaleConfig()
    model: ModelConfig = ModelConfig()
    numerics: NumericsConfig = NumericsConfig()
    task: TaskConfig = TaskConfig()
    sampling: SamplingConfig = SamplingConfig()
    algorithm: AlgorithmSection = AlgorithmSection()
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()
    training: TrainingConfig = TrainingConfig()
    sft: SFTConfig = SFTConfig()
    dpo: DPOConfig = DPOConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    generate: GenerateConfig = GenerateConfig()
    filter: FilterConfig = FilterConfig()
    compare: CompareConfig = CompareConfig()
    info: InfoConfig = InfoConfig()
    mismatch: MismatchConfig = MismatchConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        algorithm = resolve_algorithm(self)
        check_algorithm(algorithm, self.sampling.group_size, self.training.old_logprobs)
        if algorithm.overlong_penalty:
            overlong_zone(algorithm.overlong_penalty, self.sampling.max_new_tokens)
        self._check_reward()
        self._check_rows()
        self._check_best()
        if self.training.probe and self.resume is not None:
            raise ValueError(
                f"training.probe is true with resume {self.resume}; allowed: a run from its start, with what `export` "
                "writes of a checkpoint as model.path to probe that"
            )

    def _check_reward(self):
        if self.task.reward_model.path is not None and self.training.truncated == "zero":
            raise ValueError(
                "training.truncated is 'zero' with task.reward_model: a reward model's scores have no zero, and 0 may "
                "be above all others; allowed: keep, mask"
            )

    def _check_best(self):
        best, every = self.checkpoint.best, self.evaluation.every
        if best is None or not best.startswith("eval/"):
            return
        names = [section.name for section in self.evaluation.sets]
        if best.split("/")[1] not in names:
            raise ValueError(
                f"checkpoint.best is {best!r}; allowed: a metric of evaluation.sets, eval/NAME/accuracy with NAME of "
                f"{', '.join(names) or 'none'}; or one of every step, such as reward"
            )
        if not every or self.checkpoint.every % every:
            raise ValueError(
                f"checkpoint.best is {best!r} and checkpoint.every {self.checkpoint.every}; allowed: a multiple of "
                f"evaluation.every, {every}, as only evaluated checkpoints can be compared"
            )

    def _check_rows(self):
        t = self.training
        rows = t.prompts_per_step * self.sampling.group_size
        if rows % t.minibatch_size:
            raise ValueError(
                f"training.minibatch_size is {t.minibatch_size}; allowed: a divisor of prompts_per_step x "
                f"group_size = {t.prompts_per_step} x {self.sampling.group_size} = {rows}"
            )
        if t.minibatch_size % t.microbatch_size:
            raise ValueError(
                f"training.microbatch_size is {t.microbatch_size}; allowed: a divisor of minibatch_size, "
                f"{t.minibatch_size}"
            )
        for name, section in (("sft", self.sft), ("dpo", self.dpo)):
            if section.batch_size % section.microbatch_size:
                raise ValueError(
                    f"{name}.microbatch_size is {section.microbatch_size}; allowed: a divisor of batch_size, "
                    f"{section.batch_size}"
                )
        if self.sft.until_accuracy is not None and not self.evaluation.sets:
            raise ValueError(
                f"sft.until_accuracy is {self.sft.until_accuracy} and evaluation.sets is empty; allowed: null, or one "
                "set or more"
            )
        n = self.numerics
        if self.model.attention not in PACKABLE and (n.float32_weights or n.float32_cache):
            raise ValueError(
                f"numerics.{'float32_weights' if n.float32_weights else 'float32_cache'} is true with model.attention "
                f"{self.model.attention}; allowed: {', '.join(PACKABLE)}"
            )
        if self.sft.packing and self.model.attention not in PACKABLE:
            raise ValueError(
                f"sft.packing is true with model.attention {self.model.attention}; allowed: {', '.join(PACKABLE)}"
            )


def resolve_algorithm(config) -> AlgorithmConfig:
    """The preset of section `algorithm` with that section's other fields in it."""
    fields = {name: value for name, value in vars(config.algorithm).items() if value is not None}
    return get_algorithm(fields.pop("preset"), **fields)


def check_mesh_rows(config, mesh):
    """Refuses rows that the mesh cannot divide evenly, with the arithmetic."""
    parts = row_shards(mesh)
    for key, rows in (
        ("training.microbatch_size", config.training.microbatch_size),
        ("training.prompts_per_step", config.training.prompts_per_step),
        ("sft.microbatch_size", config.sft.microbatch_size),
        ("dpo.microbatch_size", config.dpo.microbatch_size),
    ):
        if rows % parts:
            raise ValueError(
                f"{key} is {rows}; allowed: multiples of mesh data x fsdp = "
                f"{mesh.shape['data']} x {mesh.shape['fsdp']} = {parts}"
            )
