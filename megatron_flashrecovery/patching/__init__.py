"""Patches for checkouts of frameworks: insertions only, for exactly the files that they were made for."""
