"""Trained networks that come with capsjax."""

from pathlib import Path

from capsjax import weights
from capsjax.networks import Network

# Files by name; beside each lies its card, NAME.md.
PRETRAINED = {
    file.stem: file for file in sorted(Path(__file__).with_name("trained").glob("*.safetensors"))
}


def pretrained(name: str = "capsnet-mnist") -> Network:
    """Returns a trained network that comes with capsjax.

    Args:
      name: `capsnet-mnist` or `efficient-mnist`: both read handwritten digits, [28, 28, 1] in 10
        classes. The card beside each, capsjax/trained/NAME.md, tells data, recipe, error, limits
        and licence.

    Returns:
      The `Network` in evaluation mode, in float32; the file holds float16.

    Raises:
      ValueError: if there is no network of this name.

    Example:
      >>> import capsjax
      >>> net = capsjax.pretrained("capsnet-mnist")
      >>> digits = capsjax.data.load("mnist").x_test[:5]
      >>> capsjax.predict(net, digits).predicted.tolist()
      [7, 2, 1, 0, 4]
    """
    if name not in PRETRAINED:
        raise ValueError(f"expected one of {', '.join(PRETRAINED)}, got {name!r}")
    return weights.load(PRETRAINED[name])
