"""What a run keeps and restores."""
