"""What takes steps: RL iterations, supervised and preference steps, the warm start, and the tail of all."""
