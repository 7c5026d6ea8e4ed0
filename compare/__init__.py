"""Comparison of models: costs, reports, evaluations, checks."""
