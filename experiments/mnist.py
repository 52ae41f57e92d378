"""CapsNet on MNIST, or on any other images: train it, test it, draw what it learnt.

python experiments/mnist.py --routings 3
python experiments/mnist.py --resume runs/mnist-20260101-120000
python experiments/mnist.py --testing --weights runs/mnist-20260101-120000
python experiments/mnist.py --data-dir my_images --validation 500
"""

from capsjax.presets import PRESETS
from capsjax.run import Experiment, main

MNIST = Experiment(
    description="Train CapsNet on images, test it, and draw what it learnt.",
    presets=PRESETS,
    dataset="mnist",
)

if __name__ == "__main__":
    main(MNIST)
