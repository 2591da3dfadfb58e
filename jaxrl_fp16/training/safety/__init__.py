"""What stops or guards a run: memory, skipped steps, bounds, deadlines, signals, the folder's lock."""
