"""A run's configuration, its set-up, its folder, what it trains, and the run while it lives."""
