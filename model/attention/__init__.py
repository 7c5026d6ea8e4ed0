"""Attention mechanisms, one file each; their interface is in base.py."""
