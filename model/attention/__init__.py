"""Attention mechanisms, one file each; their interface is in base.py."""

#: The kernels to ask for, see kernel.py.
KERNELS = ("auto", "matmul", "flash", "cudnn", "efficient", "math", "sdpa")
