"""Many jobs on one model: sweeps over a grid, the search for the best model within a budget, and comparisons of checkpoints."""
