"""How well a model does, from its outputs or from what it generates."""
