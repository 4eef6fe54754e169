"""Bidirectional encoders of the BERT shape: configuration, module, table of tensors."""
