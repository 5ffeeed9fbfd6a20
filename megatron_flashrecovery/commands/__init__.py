"""The subcommands of `flashrecovery`, one module each."""
