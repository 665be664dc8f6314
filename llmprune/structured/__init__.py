"""Structured pruning of one module: whole groups of input columns go, the weights of the others make up for them.

A group is what goes together: a channel of an FFN (one column of its down projection), or a kv group of attention heads (their
columns of the output projection).
"""
