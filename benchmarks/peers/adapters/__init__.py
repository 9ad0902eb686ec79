"""One file per package: how it is asked for the matrix of a problem, as its documentation says."""
