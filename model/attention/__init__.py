"""Attention mechanisms, one file each; their interface is in base.py."""

#: The kernels to ask for, see kernel.py. The first two are the fastest; a sweep on CUDA takes `auto` for
#: the fastest that all of its runs can train with.
KERNELS = ("auto", "fastest", "matmul", "flash", "cudnn", "efficient", "math", "sdpa", "flex")
