"""Two published models and one to train, in plain NumPy, every attention computed by attn_numba, and what scripts share."""
