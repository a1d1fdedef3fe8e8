"""The paper's language model: training speed and quality of sparse attention against dense."""
