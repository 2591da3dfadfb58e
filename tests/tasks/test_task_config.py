"""Opening tasks from their configuration."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pydantic
import pytest

from jaxrl_fp16.tasks import TASKS, ArithmeticConfig, TaskConfig, load_examples, open_task, render


def test_arithmetic_from_start_to_reward():
    with open_task(TaskConfig(arithmetic=ArithmeticConfig(kinds=("chain", "add")), seed=3)) as task:
        assert len(task.train) == 100_000 and len(task.heldout) == 256
        examples = [task.train[0], task.heldout[0]]
        prompts = [render(task.template, example) for example in examples]
        assert prompts == [example.problem for example in examples]
        rewards = task.rewards(prompts, [[example.solution, "?"] for example in examples], examples)
        np.testing.assert_array_equal(rewards.values, [[1, 0], [1, 0]])
        assert rewards.valid.all()


def test_a_template_and_another_set_for_an_open_task(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"q": "2+2=", "a": "4"}))
    with open_task(TaskConfig(template="Sum: {problem}", answer_from="last_number")) as task:
        other = dataclasses.replace(task, heldout=load_examples(path, "q", "a"))
        assert render(other.template, other.heldout[0]) == "Sum: 2+2="
        assert other.rewards([""], [["it is 4."]], other.heldout).values == 1


@pytest.mark.parametrize("config, message", [
    (TaskConfig(name="maths"), f"task.name is 'maths'; allowed: {', '.join(sorted(TASKS))}"),
    (TaskConfig(name="math"), "either task.path.*or task.hub"),
    (TaskConfig(name="math", path="a", hub="b"), "either task.path.*or task.hub"),
    (TaskConfig(name="math", path="absent.jsonl"), "absent.jsonl"),
    (TaskConfig(template="{question}"), "'question'"),
    (TaskConfig(template="nonsense"), "'nonsense'"),
])
def test_what_cannot_be_opened_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        with open_task(config):
            pass


def test_too_large_a_held_out_part_is_refused(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"problem": "p", "answer": "a"}')
    with pytest.raises(ValueError, match="heldout_size is 1 and there are 1"):
        with open_task(TaskConfig(name="math", path=str(path), heldout_size=1)):
            pass


def test_the_config_is_checked_by_pydantic():
    adapter = pydantic.TypeAdapter(TaskConfig)
    config = adapter.validate_python({"arithmetic": {"kinds": ["add"], "digits": 3}, "train_size": 5})
    assert config.arithmetic == ArithmeticConfig(kinds=("add",), digits=3) and config.train_size == 5
    for bad in ({"workers": 0}, {"train_size": 0}, {"deadline_seconds": 0}, {"arithmetic": {"digits": 9}},
                {"arithmetic": {"kinds": ["divide"]}}, {"answer_from": "box"}):
        with pytest.raises(pydantic.ValidationError):
            adapter.validate_python(bad)


def test_importing_tasks_is_light():
    code = ("import sys, jaxrl_fp16.tasks, jaxrl_fp16.tokenizer; "
            "print([name for name in ('jax', 'transformers', 'pydantic', 'sympy') if name in sys.modules])")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
