"""Probes: synthetic tasks that ask a model for one ability, with rows as hard as wanted."""
