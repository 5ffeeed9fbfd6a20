"""What can be seen to go wrong in a process, from outside of it and even after its death."""
