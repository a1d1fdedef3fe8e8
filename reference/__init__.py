"""The truth: float64 NumPy, straight from the definitions, no tricks, no blocks, no shared code."""
