"""Valid convolution that is fast on the platform it is lowered for.

GPUs and TPUs get the platform's own convolution. On a CPU that one is slow, above all in its
gradients, so a convolution is lowered to matrix products there: either patches times kernel
(`_patches.py`) or, where that takes far fewer multiplications, the Toom-Cook algorithm, which
multiplies polynomials (`_toom_cook.py` explains it).
"""

from capsjax._conv._conv import conv

__all__ = ["conv"]
