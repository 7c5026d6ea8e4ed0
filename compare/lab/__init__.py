"""Attention by hand: exercises and theorems, computed by the kernels that train."""
