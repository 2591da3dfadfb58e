"""`generate`: responses to prompts, printed."""

from jaxrl_fp16.config import naming
from jaxrl_fp16.console import Console
from jaxrl_fp16.parallel import row_shards
from jaxrl_fp16.tasks import Example
from jaxrl_fp16.tokenizer import encode_prompts
from jaxrl_fp16.training.rollouts.collect import PromptBatch, rendered, sample_and_grade
from jaxrl_fp16.training.rollouts.engine import first_batch, make_engine
from jaxrl_fp16.training.runs.positions import check_positions
from jaxrl_fp16.training.runs.setup import opened, set_up_alone


def run_generate(config):
    """Prints a group of responses to each prompt, with rewards where the problem has an answer."""
    setup = set_up_alone("generate", config)
    config, log = setup.config, Console()
    given = [Example(text, "") for text in config.generate.prompts]
    with opened(setup, problems=given or None) as bench:
        task = bench.task
        check_positions(config, "generate", bench.model.config.max_positions)
        examples = given or list((task.heldout or task.train)[:config.generate.count])
        with naming("generate"):
            prompts = _prompts(config, setup, task, examples)
        engine, params = make_engine(setup, bench.model), bench.load_params()
        with log.announce(first_batch(setup)):
            graded = sample_and_grade(engine, params, prompts, task, setup, setup.keys.evaluation)
    for text, example, responses, rewards in zip(prompts.texts, examples, graded.responses, graded.rewards.values):
        log.say(f"> {text}")
        for response, reward in zip(responses, rewards):
            log.say(f"{response}   [{reward:g}]" if example.answer else response)
    return 0


def _prompts(config, setup, task, examples):
    length = config.training.max_prompt_tokens
    examples = [*examples, *examples[:1] * (-len(examples) % row_shards(setup.mesh))]  # the caller drops the surplus
    texts, flaws = rendered(task, examples, setup.tokenizer)
    tokens, mask, kept = encode_prompts(setup.tokenizer, texts, length)
    for text, flaw, fits in zip(texts, flaws, kept):
        if flaw or not fits:
            what = "has no token" if not text else f"is {flaw or f'longer than training.max_prompt_tokens = {length}'}"
            raise ValueError(f"prompt {text[:60]!r} {what}")
    return PromptBatch(examples, texts, tokens, mask, 0, 0)
