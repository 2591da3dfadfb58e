"""The laboratory: what runs and rollouts measured, as numbers, verdicts, plots and pages."""
