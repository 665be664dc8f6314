"""Packed sparse formats and Triton kernels. May import torch and triton only, and neither a GPU nor llmprune."""
