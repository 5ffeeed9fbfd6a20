"""What can be seen to go wrong: exits, signals, device errors, hangs, numerics, slowness."""
