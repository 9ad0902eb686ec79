"""Small tools that know nothing of curvature: checks, nested tensors, dtypes, warnings, state.

In come the user's values and modules; out go checked values, or a model left as it was found.
Nothing here may import from another room of the package, but for `errors`.
"""
