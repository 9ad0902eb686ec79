"""Studies of single questions, each quoted by ``docs/``."""
