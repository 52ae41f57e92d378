"""The server: what the page asks for, checked, and answered as JSON."""

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from capsjax.data import Dataset
from drawing.ink import Pose, fit, move
from drawing.reader import ANGLES, MOST_DRAWN, Reader

MOST_BYTES = 4 * 2**20  # of a request
MOST_LAYERS, MOST_PIXELS = 2, 2**19
_LIMITS = {  # of a pose
    "rotation": (-180, 180),
    "shear": (-60, 60),
    "scale": (0.25, 4),
    "right": (-100, 100),
    "down": (-100, 100),
}
_FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    # Nothing is loaded from anywhere else.
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class Refused(ValueError):
    """A request that makes no sense; its message is for the person at the page."""


class Drawing(NamedTuple):
    """What is drawn, and how it is to be shown to which network."""

    reader: Reader
    layers: np.ndarray  # uint8 [L, h, w, c]
    centred: bool
    pose: Pose

    def make_image(self) -> np.ndarray:
        """Makes the image that the network gets."""
        fitted = fit(self.layers, self.reader.model.image_shape, centred=self.centred)
        return move(fitted, self.pose)


def make_app(readers: Sequence[Reader], digits: Dataset, hosts: Sequence[str]) -> Starlette:
    """Makes the application.

    Args:
      readers: the networks.
      digits: MNIST, whose test digits the page offers.
      hosts: names by which the server may be called; others are refused, so that no page from
        elsewhere gets answers under a name of its own.
    """

    async def answer(request: Request, work: Callable[[Any], Any]) -> Response:
        try:
            content = await _read_body(request)
            return JSONResponse(await run_in_threadpool(work, content), headers=_HEADERS)
        except Refused as refusal:
            return JSONResponse({"error": str(refusal)}, 400, headers=_HEADERS)

    async def read(request: Request) -> Response:
        return await answer(request, lambda content: _read(readers, content))

    async def curve(request: Request) -> Response:
        return await answer(request, lambda content: _turn(readers, content))

    async def draw(request: Request) -> Response:
        return await answer(request, lambda content: _draw(readers, content))

    async def digit(request: Request) -> Response:
        asked = request.path_params["number"]
        if not re.fullmatch("[0-9]{1,9}", asked):
            error = {"error": "A test digit is asked for by a number of 1 to 9 figures."}
            return JSONResponse(error, 400, headers=_HEADERS)
        number = int(asked) % len(digits.y_test)
        found = {
            "number": number,
            "label": int(digits.y_test[number]),
            "pixels": _encode(digits.x_test[number] / 255),
        }
        return JSONResponse(found, headers=_HEADERS)

    async def networks(request: Request) -> Response:
        return JSONResponse([_describe(reader) for reader in readers], headers=_HEADERS)

    routes = [
        *(Route(path, _serve(name), methods=["GET"]) for path, name in _FILES.items()),
        Route("/networks", networks, methods=["GET"]),
        Route("/digit/{number}", digit, methods=["GET"]),
        *(Route(f"/{work.__name__}", work, methods=["POST"]) for work in (read, curve, draw)),
    ]
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    return Starlette(routes=routes, middleware=[trusted])


def _serve(name: str) -> Callable[[Request], Any]:
    """Returns an endpoint that sends a file of this package, read once."""
    content = (resources.files("drawing") / name).read_bytes()
    kind = _KINDS[name.rpartition(".")[2]]

    async def send(request: Request) -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return send


async def _read_body(request: Request) -> Any:
    """Reads a request's JSON, and gives up as soon as it is too long."""
    # Of this kind a page from elsewhere cannot send any without being allowed to.
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise Refused("The request is not application/json.")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise Refused(f"The request is longer than {MOST_BYTES:,} bytes.")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refused(f"The request is not JSON: {error}.") from None


def _describe(reader: Reader) -> dict[str, Any]:
    """Describes a network to the page."""
    height, width, channels = reader.model.image_shape
    return {
        "name": reader.name,
        "kind": type(reader.model).__name__,
        "height": height,
        "width": width,
        "channels": channels,
        "classes": reader.model.num_classes,
        "dim": reader.dim,
        "iterations": reader.iterations,
        "stages": reader.stages,
        "grid": reader.grid,
        "draws": reader.draws,
        "angles": ANGLES,
    }


def _read(readers: Sequence[Reader], content: Any) -> dict[str, Any]:
    """Answers what a network makes of a drawing, and what the chosen capsule draws."""
    drawing = _take_drawing(readers, content)
    reader, image = drawing.reader, drawing.make_image()
    chosen = _take_class(reader, content, "chosen")
    reading = reader.read(image)
    found = reading.scores.argmax(1)
    shown = found if chosen is None else np.full_like(found, chosen)
    answer: dict[str, Any] = {
        "image": _encode(image),
        "scores": reading.scores.tolist(),
        "shown": shown.tolist(),
    }
    if reading.couplings is not None:
        answer["couplings"] = [
            maps[n].tolist() for maps, n in zip(reading.couplings, shown, strict=True)
        ]
    if reader.draws:
        assert reading.capsules is not None
        last = reader.iterations - 1  # as it was trained
        both = np.sort(np.argsort(-reading.scores[last], kind="stable")[:2])
        stages = np.arange(len(shown))
        capsules = np.concatenate([reading.capsules[stages, shown], reading.capsules[last, both]])
        drawings = [*map(_encode, reader.draw(capsules, np.concatenate([shown, both])))]
        answer["capsules"] = capsules[stages].tolist()
        answer["drawings"] = drawings[: len(stages)]
        answer["pair"] = {"classes": both.tolist(), "drawings": drawings[len(stages) :]}
    return answer


def _turn(readers: Sequence[Reader], content: Any) -> dict[str, Any]:
    """Answers the scores of a drawing at every angle."""
    drawing = _take_drawing(readers, content)
    image = fit(drawing.layers, drawing.reader.model.image_shape, centred=drawing.centred)
    return {"scores": drawing.reader.turn(image, drawing.pose).tolist()}


def _draw(readers: Sequence[Reader], content: Any) -> dict[str, Any]:
    """Answers what capsules draw whose numbers are given."""
    reader = _take_reader(readers, content)
    if not reader.draws:
        raise Refused("This network has no decoder.")
    chosen = _take_class(reader, content, "chosen")
    if chosen is None:
        raise Refused("chosen must be the number of a class.")
    capsules = content.get("capsules")
    if not isinstance(capsules, list) or not 1 <= len(capsules) <= MOST_DRAWN:
        raise Refused(f"capsules must be a list of 1 to {MOST_DRAWN} capsules.")
    for capsule in capsules:
        if not isinstance(capsule, list) or len(capsule) != reader.dim:
            raise Refused(f"Each capsule must be a list of {reader.dim} numbers.")
    numbers = [[_as_number(n, "a capsule", -10, 10) for n in capsule] for capsule in capsules]
    drawn = reader.draw(np.array(numbers), np.full(len(numbers), chosen))
    return {"drawings": [_encode(image) for image in drawn]}


def _take_reader(readers: Sequence[Reader], content: Any) -> Reader:
    if not isinstance(content, Mapping):
        raise Refused("The request must be a JSON object.")
    return readers[_as_integer(content.get("network"), "network", len(readers))]


def _take_class(reader: Reader, content: Mapping[str, Any], name: str) -> int | None:
    value = content.get(name)
    return None if value is None else _as_integer(value, name, reader.model.num_classes)


def _take_drawing(readers: Sequence[Reader], content: Any) -> Drawing:
    reader = _take_reader(readers, content)
    width, height = (_as_integer(content.get(n), n, 2**12) for n in ("width", "height"))
    channels = content.get("channels")
    if channels not in (1, 3) or isinstance(channels, bool):
        raise Refused("channels must be 1 or 3.")
    shape = (height, width, int(channels))
    if not 1 <= math.prod(shape) <= MOST_PIXELS:
        raise Refused(f"A layer must hold 1 to {MOST_PIXELS:,} numbers.")
    layers = content.get("layers")
    if not isinstance(layers, list) or not 1 <= len(layers) <= MOST_LAYERS:
        raise Refused(f"layers must be a list of 1 to {MOST_LAYERS} layers.")
    centred = content.get("centred")
    if not isinstance(centred, bool):
        raise Refused("centred must be true or false.")
    pixels = np.stack([_decode(layer, shape) for layer in layers])
    return Drawing(reader, pixels, centred, _take_pose(content.get("pose", {})))


def _take_pose(given: Any) -> Pose:
    if not isinstance(given, Mapping) or not set(given) <= set(_LIMITS):
        raise Refused(f"pose may hold {', '.join(_LIMITS)}.")
    return Pose(**{name: _as_number(n, name, *_LIMITS[name]) for name, n in given.items()})


def _as_integer(value: Any, name: str, below: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
        raise Refused(f"{name} must be an integer from 0 to {below - 1}.")
    return value


def _as_number(value: Any, name: str, low: float, high: float) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not low <= value <= high:  # never so for NaN
        raise Refused(f"{name} must be a number from {low} to {high}.")
    return float(value)


def _decode(layer: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes the base64 of the bytes of a layer."""
    try:
        content = base64.b64decode(layer, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise Refused("A layer must be bytes in base64.") from None
    if len(content) != math.prod(shape):
        raise Refused(f"A layer must hold {math.prod(shape):,} bytes, got {len(content):,}.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _encode(image: np.ndarray) -> str:
    """Encodes an image with pixels from 0 to 1 as the base64 of its bytes."""
    pixels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    return base64.b64encode(pixels.tobytes()).decode()
