"""Attention mechanisms, one file each; what each must offer is in base.py."""
