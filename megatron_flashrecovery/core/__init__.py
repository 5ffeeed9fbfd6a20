"""The decisions, pure: events and the time go in, commands come out. Standard library only, no I/O."""
