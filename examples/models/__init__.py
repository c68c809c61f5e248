"""Two published models in plain NumPy, every attention computed by attn_numba, and what their scripts share."""
