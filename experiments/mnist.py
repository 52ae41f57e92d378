"""Capsule networks on MNIST, or on any other images: train one, test it, draw what it learnt.

python experiments/mnist.py --routings 3
python experiments/mnist.py --network efficient
python experiments/mnist.py --resume runs/mnist-20260101-120000
python experiments/mnist.py --testing --weights runs/mnist-20260101-120000
python experiments/mnist.py --dataset flowers --data-dir my_images --validation 50

The capsules of "Dynamic Routing Between Capsules" read handwritten digits and draw them: each run
leaves its error by epoch, reconstructions, perturbations of a capsule, the digits it misreads, and
what its capsules and their couplings do.

One epoch of the preset `seed` (`--epochs 1`) takes 106 s on 2 cores of an AMD EPYC (Python 3.13,
JAX 0.12, float32) and ends with a test error of 1.25 %. The paper reports 0.25 %.

Reference: Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules", 2017, arXiv:1710.09829.
"""

from capsjax.presets import BEST, CNN, CNN_PAPER, EFFICIENT, MATRIX, PAPER, SEED
from capsjax.run import Experiment, main

MNIST = Experiment(
    description="Train a capsule network on images, test it, and draw what it learnt.",
    presets={
        "seed": SEED,  # as XifengGuo/CapsNet-Pytorch trains; the default
        "paper": PAPER,  # the authors' released code
        "best": BEST,  # seed with warped images and averaged weights
        "efficient": EFFICIENT,  # Efficient-CapsNet, trained as best trains CapsNet
        "matrix": MATRIX,  # matrix capsules with EM routing
        "cnn": CNN,  # without capsules, trained as best trains CapsNet
        "cnn-paper": CNN_PAPER,  # the baseline of the authors' paper, without capsules
    },
    dataset="mnist",
)

if __name__ == "__main__":
    main(MNIST)
