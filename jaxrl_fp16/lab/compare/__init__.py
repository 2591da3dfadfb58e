"""Runs of several precisions side by side: planned, started, read, judged and drawn."""
