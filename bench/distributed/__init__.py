"""Correctness and scaling on several processes or cards, under torchrun."""
