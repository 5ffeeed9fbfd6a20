"""Where a fault came from."""
