"""The server of the page: its answers, what it refuses, and that nothing breaks it."""

import base64
import copy
import json
import random
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from starlette.testclient import TestClient

import capsjax
import draw
from data_files import load_mnist
from drawing.ink import Pose, fit, move
from drawing.reader import ANGLES, Reader
from drawing.server import MOST_BYTES, make_app
from tiny_run import SIZES

JSON = {"content-type": "application/json"}


def make_network(kind: str) -> capsjax.Network:
    config = capsjax.NETWORKS[kind](**SIZES[kind])
    return config.build((28, 28, 1), 10, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def readers():
    return [Reader(kind, make_network(kind)) for kind in ("capsnet", "efficient", "cnn")]


@pytest.fixture(scope="module")
def client(readers):
    with TestClient(make_app(readers, load_mnist(), ["testserver"])) as client:
        yield client


def encode(pixels: np.ndarray) -> str:
    return base64.b64encode(pixels.astype(np.uint8).tobytes()).decode()


def decode(text: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)


def make_request(number: int = 0, layers: int = 1, **changed) -> dict:
    """Makes a request about test digits."""
    digits = load_mnist().x_test[number : number + layers]
    request = {
        "network": 0,
        "layers": [encode(digit) for digit in digits],
        "width": 28,
        "height": 28,
        "channels": 1,
        "centred": False,
        "pose": {},
    }
    return request | changed


def call(client, path: str, request: dict) -> dict:
    response = client.post(path, json=request)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.slow
@pytest.mark.parametrize(("network", "stages"), [(0, 5), (1, 1), (2, 1)])
def test_scores_are_those_of_the_network(client, readers, network, stages):
    answer = call(client, "/read", make_request(network=network))
    reader, image = readers[network], load_mnist().x_test[0] / np.float32(255)
    assert len(answer["scores"]) == stages
    model = make_network(reader.name)
    model.eval()
    scores = model(jnp.asarray(image)).scores
    if reader.name == "cnn":
        scores = nnx.softmax(scores)
    np.testing.assert_allclose(answer["scores"][reader.iterations - 1], scores, atol=1e-5)
    np.testing.assert_array_equal(decode(answer["image"], 28, 28, 1), load_mnist().x_test[0])
    assert answer["shown"] == np.argmax(answer["scores"], 1).tolist()
    assert ("drawings" in answer) == (reader.name != "cnn")
    assert ("couplings" in answer) == (reader.name != "cnn")


def test_after_each_iteration_scores_capsule_and_drawing_are_those_of_so_many(client):
    answer = call(client, "/read", make_request(chosen=3))
    image = jnp.asarray(load_mnist().x_test[0] / np.float32(255))
    assert answer["shown"] == [3] * 5
    for iterations in range(1, 6):
        config = capsjax.NETWORKS["capsnet"](**SIZES["capsnet"], routing=iterations)
        output = config.build((28, 28, 1), 10, rngs=nnx.Rngs(0))(image, 3)
        np.testing.assert_allclose(answer["scores"][iterations - 1], output.scores, atol=1e-5)
        np.testing.assert_allclose(
            answer["capsules"][iterations - 1], output.capsules[3], atol=1e-5
        )
        drawn = decode(answer["drawings"][iterations - 1], 28, 28, 1)
        np.testing.assert_allclose(drawn / 255, output.reconstruction, atol=3e-3)


def test_couplings_are_means_over_types_at_each_position(client, readers):
    answer = call(client, "/read", make_request(chosen=7))
    maps = np.array(answer["couplings"])
    rows, columns = readers[0].grid
    assert maps.shape == (5, rows, columns)
    assert rows == columns == 12  # 28 − 3 + 1 = 26, and with stride 2 (26 − 3) // 2 + 1
    np.testing.assert_allclose(maps[0], 0.1, atol=1e-6)
    image = jnp.asarray(load_mnist().x_test[0] / np.float32(255))
    config = capsjax.NETWORKS["capsnet"](**SIZES["capsnet"])
    net = config.build((28, 28, 1), 10, rngs=nnx.Rngs(0))
    state = capsjax.diagnostics.observe(net, image).layers["class_caps"]
    c, u = np.asarray(state.couplings[-1])[7], np.linalg.norm(state.inputs, axis=-1)
    for row, column in ((0, 0), (3, 11), (11, 5)):
        first = 2 * (row * 12 + column)
        kinds = slice(first, first + 2)  # two types
        expected = np.average(c[kinds], weights=u[kinds] + 1e-6)
        np.testing.assert_allclose(maps[2, row, column], expected, rtol=1e-4)


def test_a_pair_is_the_two_longest_capsules(client, readers):
    answer = call(client, "/read", make_request(layers=2))
    scores = np.array(answer["scores"][2])
    first, second = answer["pair"]["classes"]
    assert {first, second} == {*np.argsort(scores)[-2:].tolist()}
    assert first < second
    request = make_request(layers=2, chosen=second)
    alone = call(client, "/read", request)["drawings"][2]
    assert answer["pair"]["drawings"][1] == alone


def test_the_curve_holds_the_scores_at_every_angle(client):
    pose = {"rotation": 20.0, "scale": 0.9, "shear": 5.0, "right": 1.0, "down": -2.0}
    curve = call(client, "/curve", make_request(pose=pose))["scores"]
    assert np.shape(curve) == (len(ANGLES), 10)
    for angle in (-90, 0, 45):
        turned = make_request(pose=pose | {"rotation": 20.0 + angle})
        scores = call(client, "/read", turned)["scores"][2]
        np.testing.assert_allclose(curve[ANGLES.index(angle)], scores, atol=1e-5)


def test_numbers_are_drawn_by_the_decoder(client, readers):
    capsules = np.random.default_rng(0).uniform(-1, 1, (11, 4)).round(3)
    request = {"network": 0, "chosen": 6, "capsules": capsules.tolist()}
    drawings = call(client, "/draw", request)["drawings"]
    whole = np.zeros((11, 10, 4), np.float32)
    whole[:, 6] = capsules
    expected = make_network("capsnet").decode(jnp.asarray(whole), jnp.full(11, 6))
    for drawing, image in zip(drawings, expected, strict=True):
        np.testing.assert_allclose(decode(drawing, 28, 28, 1) / 255, image, atol=3e-3)


def test_a_centred_and_moved_drawing_is_what_the_network_gets(client):
    pose = {"rotation": 30, "down": 2}
    answer = call(client, "/read", make_request(number=4, centred=True, pose=pose))
    digit = load_mnist().x_test[4]
    image = move(fit(digit[None], (28, 28, 1), centred=True), Pose(rotation=30, down=2))
    np.testing.assert_allclose(decode(answer["image"], 28, 28, 1), 255 * image, atol=0.51)


def test_networks_and_digits_are_told(client):
    networks = client.get("/networks").json()
    assert [network["name"] for network in networks] == ["capsnet", "efficient", "cnn"]
    assert networks[0] | {"angles": None} == {
        "name": "capsnet",
        "kind": "CapsNet",
        "height": 28,
        "width": 28,
        "channels": 1,
        "classes": 10,
        "dim": 4,
        "iterations": 3,
        "stages": 5,
        "grid": [12, 12],
        "draws": True,
        "angles": None,
    }
    for number in (0, 9_999, 10_003):
        digit = client.get(f"/digit/{number}").json()
        n = number % 10_000
        assert digit["label"] == load_mnist().y_test[n]
        np.testing.assert_array_equal(decode(digit["pixels"], 28, 28, 1), load_mnist().x_test[n])


def test_the_page_is_served_and_no_path_reaches_the_disk(client):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/java")):
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        assert response.headers["content-security-policy"].startswith("default-src 'self';")
    for path in (
        "/page.html",
        "/../draw.py",
        "/..%2f..%2fpyproject.toml",
        "/page.css/../x",
        "/digit/1/2",
    ):
        assert client.get(path).status_code == 404
    assert client.get("/read").status_code == 405
    assert client.post("/", json={}).status_code == 405


@pytest.mark.parametrize("number", ["9" * 5000, "a", "-1", "1.5", "٣", "%00"])
def test_a_digit_without_a_number_is_refused_in_words(client, number):
    response = client.get(f"/digit/{number}")
    assert response.status_code == 400
    assert "a number of 1 to 9 figures" in response.json()["error"]


@pytest.mark.parametrize(
    ("host", "names"),
    [
        ("127.0.0.1", ["127.0.0.1", "localhost"]),
        ("127.0.0.2", ["127.0.0.2", "127.0.0.1"]),
        ("::1", ["[::1]", "localhost"]),
        ("0.0.0.0", ["192.0.2.7", "[2001:db8::1]"]),
    ],
)
def test_the_server_answers_to_its_own_names(readers, host, names):
    client = TestClient(make_app(readers, load_mnist(), draw.list_hosts(host)))
    for name in names:
        assert client.get("/networks", headers={"host": f"{name}:8765"}).status_code == 200
    if draw.is_loopback(host):
        other = client.get("/networks", headers={"host": "elsewhere.example:8765"})
        assert other.status_code == 400


def test_other_names_of_the_server_are_refused(client):
    assert client.get("/networks", headers={"host": "elsewhere.example"}).status_code == 400


@pytest.mark.parametrize(
    ("path", "changed", "words"),
    [
        ("/read", {"network": 3}, "network must be an integer from 0 to 2"),
        ("/read", {"network": True}, "network must be an integer"),
        ("/read", {"chosen": 10}, "chosen must be an integer from 0 to 9"),
        ("/read", {"layers": []}, "layers must be a list of 1 to 2 layers"),
        ("/read", {"layers": ["", "", ""]}, "layers must be a list of 1 to 2 layers"),
        ("/read", {"layers": ["!"]}, "A layer must be bytes in base64"),
        ("/read", {"layers": [7]}, "A layer must be bytes in base64"),
        ("/read", {"layers": ["AAAA"]}, "A layer must hold 784 bytes, got 3"),
        ("/read", {"width": 0}, "A layer must hold 1 to"),
        ("/read", {"width": 4000, "height": 4000}, "A layer must hold 1 to"),
        ("/read", {"width": -1}, "width must be an integer from 0"),
        ("/read", {"height": 2.5}, "height must be an integer from 0"),
        ("/read", {"channels": 2}, "channels must be 1 or 3"),
        ("/read", {"centred": 1}, "centred must be true or false"),
        ("/read", {"pose": {"turn": 1}}, "pose may hold rotation"),
        ("/read", {"pose": [1]}, "pose may hold rotation"),
        ("/read", {"pose": {"scale": 0}}, "scale must be a number from 0.25 to 4"),
        ("/curve", {"pose": {"rotation": "1"}}, "rotation must be a number"),
        ("/draw", {"chosen": None}, "chosen must be the number of a class"),
        ("/draw", {"capsules": []}, "capsules must be a list of 1 to 16"),
        ("/draw", {"capsules": [[0] * 4] * 17}, "capsules must be a list of 1 to 16"),
        ("/draw", {"capsules": [[0] * 3]}, "Each capsule must be a list of 4 numbers"),
        ("/draw", {"capsules": [[0, 0, 0, 11]]}, "a capsule must be a number from -10 to 10"),
        ("/draw", {"network": 2}, "This network has no decoder"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_in_words(client, path, changed, words):
    request = make_request() | {"chosen": 1, "capsules": [[0.0] * 4]} | changed
    response = client.post(path, json=request)
    assert response.status_code == 400
    assert words in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b" " * (MOST_BYTES + 1), "longer than"),
        (b'{"network": 1e999}', "network must be an integer"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_body_that_is_no_request_is_refused_in_words(client, body, words):
    for path in ("/read", "/curve", "/draw"):
        response = client.post(path, content=body, headers=JSON)
        assert response.status_code == 400
        assert words in response.json()["error"]


def test_nan_in_a_pose_or_a_capsule_is_refused(client):
    request = make_request() | {"chosen": 1, "capsules": [[0.0] * 4]}
    for path, changed in (
        ("/read", {"pose": {"rotation": float("nan")}}),
        ("/draw", {"capsules": [[float("nan"), 0, 0, 0]]}),
        ("/draw", {"capsules": [[float("inf"), 0, 0, 0]]}),
    ):
        response = client.post(path, content=json.dumps(request | changed), headers=JSON)
        assert response.status_code == 400


def test_a_request_that_any_page_may_send_is_refused(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        headers = {"content-type": kind, "origin": "http://elsewhere.example"}
        response = client.post("/read", content=json.dumps(make_request()), headers=headers)
        assert response.status_code == 400
        assert "not application/json" in response.json()["error"]


def spoil(request: dict, rng: random.Random) -> dict:
    """Replaces or removes one value anywhere in a request."""
    junk = [None, True, -1, 10**30, 1.5, "x", "../../etc/passwd", [], {}, [[]], "\0", {"a": 1}]
    spoilt = copy.deepcopy(request)
    place: dict | list = spoilt
    while True:
        keys = [*place] if isinstance(place, dict) else [*range(len(place))]
        key = rng.choice(keys)
        inner = place[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.6:
            place = inner
        else:
            break
    if rng.random() < 0.2 and key in (
        "network",
        "layers",
        "width",
        "height",
        "channels",
        "centred",
    ):
        del place[key]
        return spoilt
    place[key] = rng.choice([value for value in junk if value != inner])
    return spoilt


@pytest.mark.slow
def test_a_thousand_bad_requests_are_refused_and_the_next_good_one_is_answered(client):
    rng = random.Random(0)
    good = make_request(chosen=2, pose={"rotation": 3.0, "scale": 1.1})
    good |= {"capsules": [[0.1, 0.2, 0.3, 0.4]]}
    before = call(client, "/read", good)
    statuses = []
    for _ in range(1000):
        response = client.post(rng.choice(["/read", "/curve", "/draw"]), json=spoil(good, rng))
        statuses.append(response.status_code)
        if response.status_code == 400:
            assert response.json()["error"]
    # What a path does not look at may be anything, and a few values stay within bounds.
    assert set(statuses) <= {200, 400}
    assert statuses.count(400) > 600
    assert call(client, "/read", good) == before


def test_concurrent_users_get_each_their_own_answer(client):
    requests = [make_request(number) for number in range(12)]
    alone = [call(client, "/read", request) for request in requests]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda request: call(client, "/read", request), requests * 2))
    assert together == alone * 2
