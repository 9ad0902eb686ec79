"""Random programs on rows of data: a writer of source text, data for it, and an exact answer."""
