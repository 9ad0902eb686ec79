"""One file per package: how it is asked for the Fisher matrix of a problem."""
