"""The sections of a run's configuration that no other module owns."""

import dataclasses
from typing import Annotated, Literal, Optional, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, MinLen

from jaxrl_fp16.config import Doc
from jaxrl_fp16.engines import KINDS
from jaxrl_fp16.models.attention import AttentionKind
from jaxrl_fp16.models.decoder import DecoderConfig
from jaxrl_fp16.models.lora import LoraConfig
from jaxrl_fp16.objectives import PRESETS, AlgorithmConfig, PreferenceConfig
from jaxrl_fp16.precision import LossScaleConfig, get_policy
from jaxrl_fp16.training.updates.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class RunConfig:
    name: Annotated[str | None, Doc("first part of the run folder's name; null: the name of the config file")] = None
    dir: Annotated[str, Doc("folder in which run folders are made")] = "runs"
    seed: Annotated[int, Ge(0), Doc("seed of random weights, sampling and data order")] = 0
    stamp: Annotated[bool, Doc("end the run folder's name with the time; false: the folder is run.dir/run.name")] = True
    steps: Annotated[int, Ge(0), Doc("RL iterations of `train`")] = 100
    platform: Annotated[
        Literal["auto", "cpu", "gpu", "tpu"], Doc("where JAX runs; auto: on the best platform that it finds")
    ] = "auto"
    compile_cache: Annotated[
        str | None, Doc("folder in which compiled programs are kept; null: they are not kept")
    ] = "~/.cache/jaxrl_fp16"
    export: Annotated[bool, Doc("write the final weights as a Hugging Face folder, model/, in the run folder")] = True
    heartbeat_seconds: Annotated[
        int, Ge(1), Doc("seconds of silence after which one of several processes counts as gone and the others stop")
    ] = 60


def _optional_fields(cls, null):
    """The fields of a config class, each of which may also be null; `null(field)` is what that means, for the help."""
    hints, fields = get_type_hints(cls, include_extras=True), []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        notes = [_or_null(note, null(field)) if isinstance(note, Doc) else note for note in hint.__metadata__]
        fields.append((field.name, Annotated[(Optional[hint.__origin__], *notes)], None))
    return fields


def _or_null(doc, meaning):
    return doc if "null:" in doc.text else Doc(f"{doc.text}; null: {meaning}")


def _null_shape(field):
    """What null means for a field of the model's shape."""
    if field.name == "vocab_size":
        return "that of model.path, or of the tokenizer"
    return "that of model.path" if field.default is dataclasses.MISSING else "that of model.path, or the family's"


# `path`, or the fields of a DecoderConfig; all in one section.
ModelConfig = dataclasses.make_dataclass(
    "ModelConfig",
    [
        ("path", Annotated[
            str | None, Doc("Hugging Face folder of the model; null: random weights in the shape that model.* gives")
        ], None),
        ("tokenizer", Annotated[
            str | None, Doc("folder of the tokenizer; null: model.path, or without it a tokenizer of single characters")
        ], None),
        ("attention", Annotated[
            Literal["auto", *get_args(AttentionKind)],
            Doc("attention of sampler, scorer and update alike; auto: cudnn in half precision on an NVIDIA GPU, where "
                "nothing forbids it, else blockwise")
        ], "auto"),
        ("remat", Annotated[
            Literal["auto"] | bool,
            Doc("keep only layer inputs for the backward pass and compute products again too; auto: not on a CPU "
                "where the estimate of memory without it is below an eighth of what is there")
        ], "auto"),
        ("allow_longer", Annotated[
            bool, Doc("allow prompts with responses beyond the positions that the model's weights were made for")
        ], False),
        *_optional_fields(DecoderConfig, _null_shape),
    ],
    frozen=True,
    namespace={"__doc__": "The model: a folder, or a shape to be filled at random."},
)

def _null_lora(field):
    """What null means for a field of the adapters."""
    if field.name == "rank":
        return "that of lora.path; without it there are no adapters, and all weights are trained"
    default = ", ".join(field.default) or "all" if isinstance(field.default, tuple) else str(field.default).lower()
    return f"that of lora.path, or {default}"


# The fields of a LoraConfig, a folder to go on from, and what `export` makes of them.
LoraSection = dataclasses.make_dataclass(
    "LoraSection",
    [
        *_optional_fields(LoraConfig, _null_lora),
        ("path", Annotated[
            str | None, Doc("folder of adapters in PEFT's format to go on from; null: new ones, of no effect yet")
        ], None),
        ("merge", Annotated[
            bool, Doc("let `export` write the whole model too: adapters added in float32 to what model.path holds, and "
                      "rounded once")
        ], False),
    ],
    frozen=True,
    namespace={"__doc__": "Adapters, which alone are trained beside frozen weights; without a rank or path none."},
)

# A preset, and what differs from it.
AlgorithmSection = dataclasses.make_dataclass(
    "AlgorithmSection",
    [
        ("preset", Annotated[
            Literal[*PRESETS], Doc("preset of the algorithm, whose values the null fields of section algorithm take")
        ], "grpo"),
        *(field for field in _optional_fields(AlgorithmConfig, lambda field: "the preset's") if field[0] != "preset"),
    ],
    frozen=True,
    namespace={"__doc__": "The algorithm: a preset, and the fields of AlgorithmConfig that differ from it."},
)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    prompts_per_step: Annotated[
        int, Ge(1), Doc("prompts of an iteration; each gets sampling.group_size responses")
    ] = 64
    minibatch_size: Annotated[int, Ge(1), Doc("rows (responses) of an RL optimizer step")] = 128
    microbatch_size: Annotated[
        int, Ge(1), Doc("most rows scored or learnt from at once; divides training.minibatch_size")
    ] = 8
    microbatch_tokens: Annotated[
        int | None, Ge(1),
        Doc("most positions scored or learnt from at once, padding included: short rows then go training."
            "microbatch_size at a time, and longer ones fewer; null: training.microbatch_size times the longest row"),
    ] = None
    epochs: Annotated[int, Ge(1), Doc("passes over the rows of an iteration")] = 1
    max_prompt_tokens: Annotated[int, Ge(1), Doc("longest prompt, in tokens; longer ones are set aside")] = 1024
    old_logprobs: Annotated[
        Literal["recompute", "rollout"],
        Doc("old log-probs of the policy ratio: recompute takes the scorer's, rollout the sampler's own"),
    ] = "recompute"
    truncated: Annotated[
        Literal["keep", "zero", "mask"],
        Doc("a response cut by the length limit: keep its grade, give it reward zero (the least reward of its batch "
            "where that is below zero), or mask it out of the loss"),
    ] = "zero"
    reference: Annotated[
        Literal["device", "host"], Doc("memory that keeps the KL term's reference: device, or host between its uses")
    ] = "device"
    max_sampling_rounds: Annotated[
        int, Ge(1), Doc("algorithm.dynamic_sampling: most batches sampled to fill a step with groups of unequal reward")
    ] = 4
    max_skipped_steps: Annotated[int, Ge(1), Doc("optimizer steps skipped in a row before the run stops")] = 20
    stop_above: Annotated[
        dict[str, float],
        Doc("bounds of metrics, e.g. {mismatch/kl_k3: 0.1, kl: 5}; a metric above its bound ends the run; {}: none"),
    ] = dataclasses.field(default_factory=dict)
    stage_seconds: Annotated[
        float | None, Gt(0),
        Doc("seconds after which a stage (sampling, learning, an evaluation set, saving) ends the run; null: no limit"),
    ] = 3600.0
    max_failed_rewards: Annotated[
        float, Ge(0), Le(1), Doc("share of a sampled batch's rewards that may fail; more end the run")
    ] = 0.05
    probe: Annotated[bool, Doc("run `train` at learning rate 0: no weight moves, any mismatch is the set-up's")] = False
    tokenisation_rows: Annotated[
        int, Ge(0), Doc("responses of a step that are decoded and encoded again for terms/tokenisation; 0: none")
    ] = 16


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised training on the task's solutions; before `train` where `steps` is not 0."""

    steps: Annotated[int, Ge(0), Doc("supervised optimizer steps, of `sft` or of a warm start; 0: none")] = 0
    until_accuracy: Annotated[
        float | None, Gt(0), Le(1),
        Doc("accuracy on the first evaluation set at which a warm start ends; null: after sft.steps"),
    ] = None
    check_every: Annotated[
        int, Ge(1), Doc("warm-start steps between measurements of the accuracy that sft.until_accuracy asks for")
    ] = 10
    batch_size: Annotated[int, Ge(1), Doc("rows of a supervised step")] = 64
    microbatch_size: Annotated[
        int, Ge(1), Doc("rows of a supervised step in memory at once; divides sft.batch_size")
    ] = 64
    max_length: Annotated[int, Ge(2), Doc("longest prompt with solution, in tokens; longer ones are set aside")] = 512
    packing: Annotated[
        bool, Doc("put several prompts with solutions into one row of sft.max_length columns; the loss is the same")
    ] = False
    optimizer: Annotated[OptimizerConfig, Doc("optimizer of supervised training")] = OptimizerConfig(learning_rate=1e-5)


@dataclasses.dataclass(frozen=True)
class DPOConfig(PreferenceConfig):
    """Preference optimization on the task's pairs of responses; the reference is the model that it starts from."""

    steps: Annotated[int, Ge(1), Doc("preference optimizer steps, of `dpo`")] = 100
    batch_size: Annotated[int, Ge(1), Doc("pairs of responses of a preference step")] = 64
    microbatch_size: Annotated[
        int, Ge(1), Doc("pairs of a preference step in memory at once; divides dpo.batch_size")
    ] = 8
    max_length: Annotated[
        int, Ge(2), Doc("longest prompt with one response, in tokens; pairs with a longer one are set aside")
    ] = 1024
    optimizer: Annotated[OptimizerConfig, Doc("optimizer of preference training")] = OptimizerConfig(learning_rate=1e-6)


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    name: Annotated[str, Doc("name of the evaluation set, as in its metric eval/NAME/accuracy")]
    path: Annotated[str | None, Doc("data file of the evaluation set; null: the task's held-out problems")] = None
    template: Annotated[str | None, Doc("prompt template of the evaluation set; null: the task's")] = None
    samples: Annotated[int, Ge(1), Doc("responses sampled for each problem of the evaluation set")] = 1
    temperature: Annotated[float, Ge(0), Doc("sampling temperature of the evaluation set; 0: greedy")] = 0.0
    top_p: Annotated[float, Gt(0), Le(1), Doc("probability mass that the evaluation set samples from; 1: all")] = 1.0
    limit: Annotated[int | None, Ge(1), Doc("first problems of the evaluation set that are taken; null: all")] = None


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    every: Annotated[int, Ge(0), Doc("steps between evaluations; 0: none between a run's start and its end")] = 0
    sets: Annotated[tuple[EvaluationSet, ...], Doc("evaluation sets, each a section; []: nothing is evaluated")] = ()
    max_new_tokens: Annotated[
        int | None, Ge(1), Doc("longest response in evaluation, in tokens; null: sampling.max_new_tokens")
    ] = None
    rows: Annotated[int, Ge(1), Doc("responses that evaluation and `filter` sample at once")] = 256

    def __post_init__(self):
        names = [section.name for section in self.sets]
        if len(set(names)) < len(names) or any("/" in name for name in names):
            raise ValueError(f"sets are named {', '.join(names)}; allowed: different names without a slash")


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """PPO's critic; used where the advantage is `gae`."""

    path: Annotated[str | None, Doc("Hugging Face folder of the critic's body; null: a copy of the policy's")] = None
    precision: Annotated[str | None, Doc("precision of the critic; null: the run's")] = None
    loss_scale: Annotated[LossScaleConfig, Doc("loss scale of the critic")] = LossScaleConfig()
    optimizer: Annotated[OptimizerConfig, Doc("optimizer of the critic")] = OptimizerConfig(learning_rate=1e-5)
    warmup_steps: Annotated[int, Ge(0), Doc("first iterations in which the critic alone learns; 0: none")] = 0


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    prompts: Annotated[tuple[str, ...], Doc("problems for `generate` to answer; []: the task's held-out ones")] = ()
    count: Annotated[int, Ge(1), Doc("problems of the task that `generate` takes where generate.prompts is empty")] = 4


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Which problems `filter` keeps; the defaults are the paper's (2510.26788)."""

    samples: Annotated[int, Ge(1), Doc("responses that `filter` samples for each problem")] = 40
    low: Annotated[float, Ge(0), Le(1), Doc("lowest accuracy of a problem that `filter` keeps")] = 0.2
    high: Annotated[float, Ge(0), Le(1), Doc("highest accuracy of a problem that `filter` keeps")] = 0.8
    output: Annotated[
        str | None, Doc("JSONL file of the problems that `filter` keeps; null: filtered.jsonl in the run folder")
    ] = None

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"low is {self.low}; allowed: at most high, {self.high}")


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """The runs that `compare` starts: each engine in each precision with each seed."""

    precisions: Annotated[tuple[str, ...], Doc("precisions of the compared runs; short: --precisions A B")] = (
        "fp16", "bf16",
    )
    rollout_precisions: Annotated[
        tuple[str, ...], Doc("sampler's precisions, each combined with each of compare.precisions; []: the run's own")
    ] = ()
    engines: Annotated[
        tuple[Literal["jit", *KINDS], ...],
        Doc("engines of the compared runs, each combined with each of compare.precisions; []: rollout.engine alone; "
            "short: --engines A B"),
    ] = ()
    seeds: Annotated[
        tuple[Annotated[int, Ge(0)], ...], Doc("seeds of the compared runs; []: run.seed alone; short: --seeds 0 1 2")
    ] = ()
    jobs: Annotated[
        int | None, Ge(1),
        Doc("compared runs side by side; null: one on an accelerator, on a CPU one for each core; short: --jobs"),
    ] = None
    collapse: Annotated[
        float, Gt(0), Le(1), Doc("share of its peak by which a run's reward must fall, and stay, to have collapsed")
    ] = 0.25

    def __post_init__(self):
        for name in ("precisions", "rollout_precisions", "engines", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (name == "precisions" and not values):
                raise ValueError(f"{name} are {', '.join(map(str, values)) or 'none'}; allowed: one or more, each once")
        for name in (*self.precisions, *self.rollout_precisions):
            get_policy(name)


@dataclasses.dataclass(frozen=True)
class InfoConfig:
    """What `info` looks at."""

    rows: Annotated[int, Ge(1), Doc("problems that `info` looks at, with solutions or with sampled responses")] = 8
    max_new_tokens: Annotated[
        int, Ge(1), Doc("longest response that `info` samples, in tokens; sampling.max_new_tokens limits it too")
    ] = 128
    output: Annotated[str | None, Doc("JSON file of all figures of `info`; null: the console alone")] = None


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What `plan` compiles a config's programs for."""

    target: Annotated[
        str | None,
        Doc("machine that `plan` compiles for: h100x8 (GPUs), v5e-16 (chips), v5p-256 (cores, two a chip), or a "
            "topology, h100:1x4x8 (slices x hosts x GPUs), v5p:2x2x1; null: none, which `plan` refuses"),
    ] = None
    search: Annotated[bool, Doc("compile the update for up to six meshes of the same devices and compare them")] = False
    output: Annotated[
        str | None, Doc("folder of `plan`'s page and figures; null: run.dir/plan-, with run.name and the target")
    ] = None
    seconds: Annotated[float, Gt(0), Doc("seconds after which `plan` gives one compiler up")] = 1800.0


@dataclasses.dataclass(frozen=True)
class MismatchConfig:
    """What `mismatch` samples, scores and draws."""

    precisions: Annotated[
        tuple[str, ...], MinLen(1),
        Doc("precisions that `mismatch` compares: each samples, and scores all samples; short: --precisions A B"),
    ] = ("fp16", "bf16")
    engines: Annotated[
        tuple[Literal["jit", *KINDS], ...],
        Doc("engines that `mismatch` draws side by side, each in each precision; []: rollout.engine alone, or with "
            "mismatch.rollout_files none; short: --engines A B"),
    ] = ()
    reference: Annotated[str, Doc("precision whose log-probs `mismatch` takes for the exact ones")] = "fp32"
    rollouts: Annotated[str | None, Doc("folder of stored rollouts for `mismatch` to read; null: it samples")] = None
    rollout_files: Annotated[
        tuple[str, ...],
        Doc("files of rollouts that any engine drew, in the format of docs/rollouts.md, for `mismatch` to score; []: "
            "none; short: --rollouts FILE ..."),
    ] = ()
    prompts: Annotated[
        int | None, Ge(1), Doc("prompts of the task that `mismatch` samples from; null: training.prompts_per_step")
    ] = None
    bins: Annotated[int, Ge(1), Doc("most bins on the axis of a figure of `mismatch`")] = 12
    attribution: Annotated[
        bool, Doc("let `mismatch` measure by module too, on some responses; costs some hundred forwards of them")
    ] = False

    def __post_init__(self):
        if len(set(self.engines)) < len(self.engines):
            raise ValueError(f"engines are {', '.join(self.engines)}; allowed: each once")
