"""Accuracy and pass@k of a policy on sets of problems.

n: problems.  k: samples of each.
"""

import dataclasses
import math

import jax
import numpy as np

from jaxrl_fp16.parallel import row_shards
from jaxrl_fp16.tasks import check_template, flaw_of, get_template, load_examples, render
from jaxrl_fp16.tokenizer import encode_prompts
from jaxrl_fp16.training.rollouts.collect import LOOKED_AT, PromptBatch, rendered, sample_and_grade
from jaxrl_fp16.training.rollouts.engine import make_engine


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """One evaluation set, with its sampler compiled once."""

    name: str
    task: object          # its `heldout` are the set's problems
    engine: object        # as `make_engine` gives it
    prompts_at_once: int
    samples: int


def make_evaluators(bench):
    """An Evaluator for each of `evaluation.sets` of an `Opened` command. Raises ValueError for a set at fault."""
    return [_evaluator_of(bench, section) for section in bench.setup.config.evaluation.sets]


def _evaluator_of(bench, section):
    config, task = bench.setup.config, bench.task
    if section.path is not None:
        fields = (config.task.problem_field, config.task.answer_field, None, config.task.reward_file is None)
        task = dataclasses.replace(task, heldout=load_examples(section.path, *fields))
    if section.template is not None:
        options = task.template.options if section.template == "chat" else {}
        template = get_template(section.template, config.task.system, None, options, task.template.date)
        task = dataclasses.replace(task, template=template)
    if not len(task.heldout):
        raise ValueError(
            f"evaluation set {section.name!r} has no problems; allowed: a path, or task.heldout_size above 0"
        )
    check_template(task.template, task.heldout[0], bench.setup.tokenizer)
    task = dataclasses.replace(task, heldout=task.heldout[: section.limit])
    if config.task.reward_file is None and not all(example.answer for example in task.heldout):
        raise ValueError(
            f"evaluation set {section.name!r} has problems without an answer to grade by; allowed: rows with the "
            "field task.answer_field, or task.reward_file"
        )
    sampling = dataclasses.replace(
        config.sampling, temperature=section.temperature, top_p=section.top_p, top_k=0, group_size=section.samples,
        max_new_tokens=config.evaluation.max_new_tokens or config.sampling.max_new_tokens, max_rows=0,
    )
    return make_evaluator(bench, section.name, task, sampling)


def make_evaluator(bench, name, task, sampling):
    """An Evaluator of `task.heldout` under a SamplingConfig, `evaluation.rows` responses at once."""
    setup = bench.setup
    read = isinstance(task.heldout, (list, tuple))  # a chat template may fail on any row; generated ones are alike
    flaws = [flaw_of(render(task.template, example, setup.tokenizer), example)
             for example in (task.heldout if read else task.heldout[:LOOKED_AT])]
    if None not in flaws:
        raise ValueError(f"no problem of {name!r} makes a prompt: the first is {flaws[0]}; allowed: problems with a "
                         "text, and a template that shows it")
    parts, samples = row_shards(setup.mesh), sampling.group_size
    at_once = min(max(1, setup.config.evaluation.rows // samples), len(task.heldout))
    return Evaluator(name, task, make_engine(setup, bench.model, sampling), math.ceil(at_once / parts) * parts, samples)


def evaluate(evaluator, params, setup, length, key, tell=lambda text: None):
    """Metrics of one set: `eval/NAME/accuracy` (mean reward of all samples), `.../stderr` (over problems),
    `.../pass@k`, `.../response_length`, `.../finished`, `.../problems`.

    Prompts longer than `length` tokens, or without their problem's text, count as unsolved, and where there are any
    `.../prompts_set_aside` says how many: a set's size does not depend on a limit.
    tell: takes a line on how far it is, every few seconds while responses are long, and after each chunk but the last.
    """
    rewards, lengths, finished, aside, done, total = [], [], [], 0, 0, len(evaluator.task.heldout)

    def watch(found):
        tell(f"evaluating {evaluator.name}: {done} of {total} problems; {found}")

    for kept, graded in grade_chunks(evaluator, params, setup, length, key, watch=watch):
        count, aside = len(kept), aside + int((~kept).sum())
        counted = kept[:, None] & graded.rewards.valid[:count]
        values = np.where(counted, graded.rewards.values[:count], 0.0)
        rewards.append(values)
        lengths.append(graded.lengths[: values.size])
        finished.append(graded.finished[: values.size])
        done += count
        if done < total:
            right = sum(chunk.mean(axis=1).sum() for chunk in rewards)
            tell(f"evaluating {evaluator.name}: {done} of {total} problems, accuracy so far {right / done:.3f}")
    found = _metrics(evaluator.name, np.concatenate(rewards), np.concatenate(lengths), np.concatenate(finished))
    return found | ({f"eval/{evaluator.name}/prompts_set_aside": float(aside)} if aside else {})


def grade_chunks(evaluator, params, setup, length, key, start=0, watch=None):
    """Yields `(kept bool [c], Graded)` for each chunk of a set's problems, in order: the first c groups are theirs.

    kept: False where a prompt has more than `length` tokens, or lacks its problem's text. `start`, a multiple of
    `prompts_at_once`, is the first problem: what a chunk gives depends on its place alone. watch: as for `make_engine`.
    """
    for begin in range(start, len(evaluator.task.heldout), evaluator.prompts_at_once):
        chunk = evaluator.task.heldout[begin:begin + evaluator.prompts_at_once]
        prompts, kept = _prompts(evaluator, chunk, setup.tokenizer, length)
        chunk_key = jax.random.fold_in(key, begin // evaluator.prompts_at_once)
        yield kept, sample_and_grade(evaluator.engine, params, prompts, evaluator.task, setup, chunk_key, watch)


def _prompts(evaluator, chunk, tokenizer, length):
    """A full batch: a last one that is short is filled with its first problem again, so that nothing recompiles."""
    missing = evaluator.prompts_at_once - len(chunk)
    examples = [*chunk, *[chunk[0]] * missing]
    texts, flaws = rendered(evaluator.task, examples, tokenizer)
    tokens, mask, kept = encode_prompts(tokenizer, texts, length)
    mask[~kept, -1] = True  # a prompt that does not fit is sampled from one pad token, and not counted
    kept &= np.array([flaw is None for flaw in flaws], bool)
    return PromptBatch(examples, texts, tokens, mask, 0, 0), kept[: len(chunk)]


def _metrics(name, rewards, lengths, finished):
    count, samples = rewards.shape
    per_problem = rewards.mean(axis=1)
    metrics = {
        "accuracy": per_problem.mean(),
        "stderr": per_problem.std(ddof=1) / math.sqrt(count) if count > 1 else 0.0,
        "response_length": lengths.mean(),
        "finished": finished.mean(),
        "problems": count,
    }
    solved = (rewards > 0.5).sum(axis=1)
    for k in sorted({2**power for power in range(samples.bit_length())} | {samples}) if samples > 1 else ():
        metrics[f"pass@{k}"] = np.mean([pass_at_k(samples, int(right), k) for right in solved])
    return {f"eval/{name}/{key}": float(value) for key, value in metrics.items()}


def pass_at_k(samples, right, k):
    """The unbiased chance that one of `k` samples is right, given `right` of `samples` are (2107.03374)."""
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod((samples - right - i) / (samples - i) for i in range(k))
