"""Everything that trains: pure updates, rollouts, checkpoints, guards, and the loops over them."""
