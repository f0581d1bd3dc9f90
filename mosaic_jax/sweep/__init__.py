"""Run many configs to their end: the client sweep, and what other commands share with it."""
