"""How long the estimation of a Fisher matrix takes, here and in other packages."""
