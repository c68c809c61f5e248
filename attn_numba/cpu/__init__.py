"""Attention on the CPU: compiled kernels, their tiles and hooks, and the workers that run them."""
