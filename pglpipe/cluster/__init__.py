"""Processes: who takes part, what they agree on, and whether they live."""
