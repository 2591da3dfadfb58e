"""The configuration of a run: the modules' own dataclasses, assembled."""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from jaxrl_fp16.config import Doc, load_config
from jaxrl_fp16.engines import RolloutConfig, check_rank, check_sampling
from jaxrl_fp16.logs import LoggingConfig
from jaxrl_fp16.models.attention import PACKABLE
from jaxrl_fp16.models.numerics import NumericsConfig
from jaxrl_fp16.objectives import (
    AlgorithmConfig, check_algorithm, get_algorithm, overlong_zone,
)
from jaxrl_fp16.parallel import MeshConfig, row_shards
from jaxrl_fp16.precision import LossScaleConfig
from jaxrl_fp16.sampling import SamplingConfig
from jaxrl_fp16.tasks import TaskConfig
from jaxrl_fp16.telemetry import TelemetryConfig
from jaxrl_fp16.training.checkpoints.checkpoint import CheckpointConfig
from jaxrl_fp16.training.runs.sections import (
    AlgorithmSection, CompareConfig, CriticConfig, DPOConfig, EvaluationConfig, FilterConfig, GenerateConfig,
    InfoConfig, LoraSection, MismatchConfig, ModelConfig, PlanConfig, RunConfig, SFTConfig, TrainingConfig,
)
from jaxrl_fp16.training.updates.optimizer import OptimizerConfig

# Of a resumed run these may differ from what it was started with: how long, how seen, on what.
MAY_CHANGE = ("run.steps", "sft.steps", "dpo.steps", "run.dir", "run.compile_cache", "run.export", "logging",
              "checkpoint", "evaluation", "mesh", "resume", "training.reference", "training.tokenisation_rows",
              "generate", "telemetry", "info", "filter.low", "filter.high", "filter.output", "compare.jobs",
              "mismatch", "plan", "task.workers", "task.deadline_seconds", "task.batch_seconds", "task.memory_mb",
              "training.stage_seconds", "training.stop_above", "run.heartbeat_seconds", "model.allow_longer",
              "model.remat", "rollout.python", "rollout.exchange", "rollout.memory_fraction", "rollout.stop_above",
              "rollout.deadline_seconds", "lora.merge")

# Keys that are no longer there, with the defaults that they had: a run that was started with those is resumed.
GONE: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a command reads; checked for one that trains."""

    trains: ClassVar[bool] = True

    precision: Annotated[
        str,
        Doc("precision of the run: auto (fp16, on a TPU bf16), fp16, bf16, fp32 or "
            "params=float32,compute=DTYPE,output=DTYPE"),
    ] = "auto"
    rollout_precision: Annotated[
        str | None, Doc("precision of the sampler alone, for the ablation; null: that of the run")
    ] = None
    platform: Annotated[
        Literal["auto", "cpu", "gpu", "tpu"] | None, Doc("short for run.platform; null: as run.platform says")
    ] = None
    resume: Annotated[str | None, Doc("run folder that the command continues from, or exports; null: a new run")] = None
    run: RunConfig = RunConfig()
    loss_scale: LossScaleConfig = LossScaleConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraSection = LoraSection()
    numerics: NumericsConfig = NumericsConfig()
    task: TaskConfig = TaskConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
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
    plan: PlanConfig = PlanConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        algorithm = resolve_algorithm(self)
        check_algorithm(algorithm, self.sampling.group_size, self.training.old_logprobs)
        if algorithm.overlong_penalty:
            overlong_zone(algorithm.overlong_penalty, self.sampling.max_new_tokens)
        self._check_engine()
        self._check_lora()
        self._check_reward()
        self._check_rows()
        self._check_microbatches()
        self._check_supervised()
        self._check_numerics()
        self._check_best()
        if self.training.probe and self.resume is not None:
            raise ValueError(
                f"training.probe is true with resume {self.resume}; allowed: a run from its start, with what `export` "
                "writes of a checkpoint as model.path to probe that"
            )

    def _check_engine(self):
        check_sampling(self.rollout.engine, self.sampling)
        check_rank(self.rollout.engine, self.lora.rank)

    def _check_lora(self):
        given = {name: value for name, value in vars(self.lora).items() if value is not None and name != "merge"}
        if given and not given.keys() & {"rank", "path"}:
            name, value = next(iter(given.items()))
            raise ValueError(f"lora.{name} is {value} without adapters; allowed: with lora.rank or lora.path, or null")

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

    def _check_microbatches(self):
        t = self.training
        if t.minibatch_size % t.microbatch_size:
            raise ValueError(
                f"training.microbatch_size is {t.microbatch_size}; allowed: a divisor of minibatch_size, "
                f"{t.minibatch_size}"
            )
        longest = t.max_prompt_tokens + self.sampling.max_new_tokens
        if t.microbatch_tokens is not None and t.microbatch_tokens < longest:
            raise ValueError(
                f"training.microbatch_tokens is {t.microbatch_tokens}; allowed: null, or at least max_prompt_tokens + "
                f"max_new_tokens = {t.max_prompt_tokens} + {self.sampling.max_new_tokens} = {longest}"
            )

    def _check_supervised(self):
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
        if self.sft.packing and self.model.attention not in ("auto", *PACKABLE):
            raise ValueError(
                f"sft.packing is true with model.attention {self.model.attention}; allowed: {', '.join(PACKABLE)}"
            )

    def _check_numerics(self):
        n = self.numerics
        if self.model.attention not in ("auto", *PACKABLE) and (n.float32_weights or n.float32_cache):
            raise ValueError(
                f"numerics.{'float32_weights' if n.float32_weights else 'float32_cache'} is true with model.attention "
                f"{self.model.attention}; allowed: {', '.join(PACKABLE)}"
            )


@dataclasses.dataclass(frozen=True)
class UntrainedConfig(Config):
    """The same for a command that trains nothing: what only a training needs is not asked of it."""

    trains: ClassVar[bool] = False

    def __post_init__(self):
        self._check_engine()
        self._check_lora()
        self._check_numerics()


@dataclasses.dataclass(frozen=True)
class MeasuredConfig(Config):
    """The same for `mismatch`, which runs the programs of training, on any number of rows and without advantages."""

    def __post_init__(self):
        resolve_algorithm(self)
        self._check_engine()
        self._check_lora()
        self._check_microbatches()
        self._check_numerics()


# What the commands that train nothing read, beside the keys at the top: others may be at fault there.
SAMPLING = ("run", "model", "lora", "numerics", "task", "sampling", "training", "mesh")
USED = {
    "eval": (*SAMPLING, "rollout", "evaluation"),
    "filter": (*SAMPLING, "rollout", "evaluation", "filter"),
    "generate": (*SAMPLING, "rollout", "generate"),
    "info": (*SAMPLING, "loss_scale", "algorithm", "info"),
    "mismatch": (*SAMPLING, "rollout", "loss_scale", "algorithm", "optimizer", "mismatch"),
}


def load_for(command: str, path, overrides=()) -> Config:
    """`load_config` of what `command` reads. A section that it does not read is held to the types of its keys, and
    where its values do not go together it stays at its defaults."""
    if command not in USED:
        return load_config(Config, path, overrides)
    sections = [field.name for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.default)]
    cls = MeasuredConfig if command == "mismatch" else UntrainedConfig
    return load_config(cls, path, overrides, unused=[name for name in sections if name not in USED[command]])


def resolve_algorithm(config) -> AlgorithmConfig:
    """The preset of section `algorithm` with that section's other fields in it."""
    fields = {name: value for name, value in vars(config.algorithm).items() if value is not None}
    return get_algorithm(fields.pop("preset"), **fields)


def memory_share(config, whole: float, command: str = "train") -> float:
    """JAX's share of a GPU's memory, of the `whole` that it would take alone: another engine on that card has its
    own, whether section `rollout` names it or the `engines` of the command's own section do."""
    engines = getattr(getattr(config, command, None), "engines", ()) or (config.rollout.engine,)
    return whole if set(engines) == {"jit"} else whole - config.rollout.memory_fraction


def check_mesh_rows(config, mesh, command="train"):
    """Refuses rows of `command` that the mesh cannot divide evenly, with the arithmetic."""
    parts = row_shards(mesh)
    sections = {"sft": ["sft"], "warmup": ["sft"], "dpo": ["dpo"]}.get(command, ["training"])
    if config.sft.steps and "sft" not in sections:
        sections.append("sft")
    keys = [f"{section}.microbatch_size" for section in sections]
    for key in [*keys, *(["training.prompts_per_step"] if "training" in sections else [])]:
        section, name = key.split(".")
        rows = getattr(getattr(config, section), name)
        if rows % parts:
            raise ValueError(
                f"{key} is {rows}; allowed: multiples of mesh data x fsdp = "
                f"{mesh.shape['data']} x {mesh.shape['fsdp']} = {parts}"
            )
    tokens, longest = config.training.microbatch_tokens, config.training.max_prompt_tokens
    longest += config.sampling.max_new_tokens
    if "training" in sections and tokens is not None and tokens < longest * parts:
        raise ValueError(
            f"training.microbatch_tokens is {tokens}; allowed: null, or at least max_prompt_tokens + max_new_tokens "
            f"for each of mesh data x fsdp = {parts} devices, {longest * parts}"
        )
