"""Sampler against scorer, offline: rollouts scored by several programs, figures, and where the difference arises."""
