"""What the penalty costs in a training step, here and in other packages."""
