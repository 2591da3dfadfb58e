"""Whole steps of TRL's GRPO, one a turn; the work is the tokens that were generated.

Settings: folder (a model with a tokenizer), prompts (texts, all of them in every step), group, new_tokens,
microbatch, bf16, learning_rate, max_norm, clip.
"""

import tempfile

from datasets import Dataset
import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from turns import Turns

MANY = 10**6  # steps: the parent says when it is enough


class OneTurnAStep(TrainerCallback):
    """A step begins before its rows are generated, and ends behind its optimizer's step."""

    def __init__(self, turns):
        self.turns, self.generated = turns, 0

    def on_step_begin(self, *args, **kwargs):
        self.turns.start()

    def on_step_end(self, *args, **kwargs):
        self.turns.end(self.generated)
        self.generated = 0

    def reward(self, completion_ids, **kwargs):
        self.generated += sum(map(len, completion_ids))
        return [float(sum(ids) % 2) for ids in completion_ids]


def main():
    turns = Turns()
    torch.set_num_threads(1)
    s, callback = turns.settings, OneTurnAStep(turns)
    rows = len(s["prompts"]) * s["group"]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=s["bf16"], gradient_checkpointing=False,
        per_device_train_batch_size=s["microbatch"], gradient_accumulation_steps=rows // s["microbatch"],
        num_generations=s["group"], max_completion_length=s["new_tokens"], max_steps=MANY,
        learning_rate=s["learning_rate"], lr_scheduler_type="constant", max_grad_norm=s["max_norm"],
        epsilon=s["clip"], report_to="none", save_strategy="no", disable_tqdm=True,
    )
    prompts = Dataset.from_dict({"prompt": s["prompts"]})
    GRPOTrainer(s["folder"], callback.reward, config, prompts, callbacks=[callback]).train()


if __name__ == "__main__":
    main()
