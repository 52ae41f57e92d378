"""Image grids and figures of arrays.

Images are [..., H, W, C], uint8 from 0 to 255 or float from 0 to 1; floats outside that range are
clipped. One channel is drawn in grey, three as RGB, any other number as the grey of their mean.
Figures are made without pyplot: `figure.savefig(path)` writes one, a notebook displays it.
"""

from capsjax.viz._capsules import capsules
from capsjax.viz._curves import curves
from capsjax.viz._grids import image_grid
from capsjax.viz._misread import misread
from capsjax.viz._overlaps import overlaps
from capsjax.viz._perturbations import perturbations
from capsjax.viz._reconstructions import reconstructions

__all__ = [
    "capsules",
    "curves",
    "image_grid",
    "misread",
    "overlaps",
    "perturbations",
    "reconstructions",
]
