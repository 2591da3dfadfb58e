"""From prompts to graded rollouts: the engine that samples, the grading, evaluation."""
