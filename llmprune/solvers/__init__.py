"""Solvers of the block problem: which weights of a block to prune, their number fixed.

:class:`llmprune.solvers.problem.BlockProblem` says what is asked, :func:`llmprune.solvers.solve.solve` answers it with
simulated annealing, with best-swap descent, by trying everything, or with any function the caller brings.
"""
