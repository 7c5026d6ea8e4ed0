"""Processes that belong together: those of a run, and those that end with another."""
