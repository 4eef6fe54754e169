"""How a jaxpr with scaled weights in it is read: a value type, and a rule per primitive."""
