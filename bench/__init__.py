"""Every figure that the README quotes, and the commands that repeat them."""
