"""From rows of files, of the hub or in memory to batches of tokens."""
