"""A run: what executes a method, and what a run writes to and reads from its work directory."""
