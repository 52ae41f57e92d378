"""A whole process of PyTorch: it trains, evaluates once, saves its weights, and ends."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarking.contender import Contender
from benchmarking.torch_tasks import make_network_tasks


def main() -> None:
    """Trains on images of a file from its first parameters, without moving the images."""
    contender, images, path = Contender(**json.loads(sys.argv[1])), int(sys.argv[2]), sys.argv[3]
    with np.load(path) as file:
        inputs = dict(file)
    net, train, predict = make_network_tasks(contender, inputs)
    x, y, size = inputs["x"], inputs["y"], contender.batch_size
    order = np.random.default_rng(0).permutation(images)
    for batch in order[: images // size * size].reshape(-1, size):
        train(x[batch], y[batch])
    tested = inputs["x_test"], inputs["y_test"]
    wrong = 0
    for start in range(0, len(tested[0]), size):
        pixels, labels = (array[start : start + size] for array in tested)
        wrong += int((predict(pixels) != labels).sum())
    torch.save(net.state_dict(), Path(path).with_suffix(".pt"))
    print(f"test error: {100 * wrong / len(tested[0]):.2f} %")


if __name__ == "__main__":
    main()
