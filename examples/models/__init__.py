"""Two published models and one to train, in plain NumPy with attention by attn_numba, and what their scripts share."""
