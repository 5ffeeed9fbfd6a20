"""Fakes and stand-ins that ship with the package; nothing else in it imports them."""
