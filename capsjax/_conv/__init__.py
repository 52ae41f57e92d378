"""Valid convolution that is fast on the platform it is lowered for.

GPUs and TPUs get the platform's own convolution (`_native.py`). On a CPU that one is good for small
kernels only. There, images of few channels are cut into patches, which a matrix product multiplies
by the kernel (`_patches.py`), and large kernels take the Toom-Cook algorithm, which multiplies
polynomials and needs far fewer multiplications (`_toom_cook.py` explains it).
"""

from capsjax._conv._conv import conv

__all__ = ["conv"]
