"""Causal language models of the Llama shape: configuration, module, table of tensors."""
