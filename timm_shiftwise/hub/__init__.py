"""Weights on their way to the Hugging Face Hub: checkpoints converted, model cards written, folders published."""
