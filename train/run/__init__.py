"""The run folder: its lock, its log, its figures, its report, the adapter that it left."""
