"""One module per subcommand: its options, a frozen dataclass, and ``run(options)``."""
