"""Many devices as one: where each array lies."""
