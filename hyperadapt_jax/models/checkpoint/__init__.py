"""Hugging Face folders in and out: one engine for all models, driven by a table of tensors."""
