"""Packed sparse formats and Triton kernels: 2:4 and bitmask weights, the layers that multiply by them, and their dispatch.

May import torch and triton only, and neither a GPU nor llmprune. Triton is imported when a kernel is launched, not before.
"""

from llmprune_kernels import bitmask, fragments, int8, legacy, ops, reference, two_four
from llmprune_kernels._bits import FLOATS
from llmprune_kernels.bitmask import Bitmask
from llmprune_kernels.dispatch import choose
from llmprune_kernels.fuse import fuse_, fuse_siblings_
from llmprune_kernels.layer import PackedLinear
from llmprune_kernels.linear import BitmaskLinear, SparseLinear24, prepare_, tune_
from llmprune_kernels.ops import linear_24, linear_24_int8, linear_24_mma, linear_bitmask
from llmprune_kernels.tuning import tune
from llmprune_kernels.two_four import TwoFour

__all__ = [
    # layers
    "SparseLinear24", "BitmaskLinear", "PackedLinear", "fuse_", "fuse_siblings_", "prepare_",
    # formats
    "TwoFour", "Bitmask", "two_four", "bitmask", "int8", "fragments", "legacy", "FLOATS",
    # ops and what they choose
    "linear_24", "linear_24_mma", "linear_24_int8", "linear_bitmask", "ops", "reference", "choose", "tune", "tune_",
]  # fmt: skip
