"""Attention on NVIDIA GPUs, by Numba.

Not named after CUDA: numba-cuda's import hook takes every module with "numba.cuda" in its name for its own, and
"attn_numba.cuda" would be one.
"""
