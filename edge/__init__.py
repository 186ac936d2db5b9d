"""The `edge` command: one module per subcommand."""
