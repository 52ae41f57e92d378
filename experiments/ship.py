"""Makes a trained network part of the package: its weights in float16, and the card beside them.

python experiments/ship.py runs/best-0 capsnet-mnist

The card tells the error of the float16 file, tested here after it was written.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import nnx

import capsjax
import table
from capsjax.run.folder import FINAL_WEIGHTS

TRAINED = Path(capsjax.__file__).with_name("trained")
CARD = """\
# {name}

`capsjax.pretrained("{name}")` is a trained {kind} of {size:,} parameters.
It reads handwritten digits: images [28, 28, 1], white on black, in 10 classes.
`python experiments/mnist.py --testing --weights {name}` tests it.

**Error.** {error:.2f} % ({wrong} of {examples:,} MNIST test digits), measured with these weights in
float16; the run that made them ended with {last:.2f} % in {precision}.

**Data.** {trained_on:,} training digits of MNIST. Test digits were used for no choice.

**Recipe.** Commit {commit} trained it; today's command is:

```
{command}
```

**File.** {name}.safetensors, {megabytes:.1f} MB; `capsjax.weights.load` returns float32.

**Limits.** The digits must be drawn as MNIST's are: fitted into 20×20 pixels, their centre of mass
in the middle of 28×28, light on dark. Any other image gets one of the ten classes too, often with a
low score. The network never saw letters, other scripts or photographs.

**Licence.** The weights, like the code: Apache-2.0. MNIST, which they were trained on: Yann LeCun
and Corinna Cortes, CC BY-SA 3.0 ([MNIST.md](../data/MNIST.md)).

Made by `python experiments/ship.py`.
"""


@dataclasses.dataclass(frozen=True)
class Ship:
    """Writes a run's last weights in float16, and their card, to where `capsjax.pretrained` finds
    them."""

    run: tyro.conf.Positional[Path]
    """Folder of a run on MNIST that has ended."""
    name: tyro.conf.Positional[str]
    """Name of the network."""
    out: Path = TRAINED
    """Folder of the trained networks."""


def main() -> None:
    settings = tyro.cli(Ship)
    run, trained = table.read_run(settings.run), settings.run / FINAL_WEIGHTS
    net, about = capsjax.weights.load(trained), capsjax.weights.describe(trained)
    assert about is not None  # a run leaves what `save` wrote
    file = settings.out / f"{settings.name}.safetensors"
    capsjax.weights.save(net, file, about.notes, dtype="float16")
    digits, images = capsjax.data.load("mnist"), run.settings.images
    wrong = count_errors(capsjax.weights.load(file), digits)
    examples = len(digits.y_test)
    notes = about.notes | {"test_error": round(100 * wrong / examples, 4)}
    capsjax.weights.save(net, file, notes, dtype="float16")
    card = CARD.format(
        name=settings.name,
        kind=type(net).__name__,
        size=sum(array.size for array in jax.tree.leaves(nnx.state(net, nnx.Param))),
        error=notes["test_error"],
        wrong=wrong,
        examples=examples,
        trained_on=images.train_size or len(digits.y_train) - images.validation,
        command=table.make_command(run),
        commit=run.config["git"],
        last=about.notes["test_error"],
        precision=run.settings.recipe.precision,
        megabytes=file.stat().st_size / 1e6,
    )
    file.with_suffix(".md").write_text(card, encoding="utf-8")
    print(card)


def count_errors(net: capsjax.Network, digits: capsjax.data.Dataset) -> int:
    """Counts the test images that a network misreads."""
    batches = np.split(digits.x_test, range(500, len(digits.x_test), 500))
    predicted = np.concatenate([capsjax.predict(net, batch).predicted for batch in batches])
    return int(np.sum(predicted != digits.y_test))


if __name__ == "__main__":
    main()
