"""The paper's procedures as loops in NumPy and float64, written from the paper's text.

Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules", 2017, arXiv:1710.09829.

Each function computes one example; `np.vectorize` loops over the leading axes.
"""

import math

import numpy as np


@np.vectorize(signature="(d)->()")
def length(x):
    """Computes √(Σ x²)."""
    return math.sqrt(sum(float(component) ** 2 for component in x))


@np.vectorize(signature="(d)->(d)")
def squash(s):
    """Shrinks short vectors to almost zero, long ones to a length slightly below 1 (eq. 1)."""
    norm = float(length(s))
    if norm == 0:
        return np.zeros(len(s))
    return norm**2 / (1 + norm**2) * (np.asarray(s, np.float64) / norm)


@np.vectorize(signature="(d)->(d)")
def squash_exp(s):
    """Shrinks vectors to 1 − e^−|s| (Mazzia, Salvetti, Chiaberge, 2021)."""
    norm = float(length(s))
    if norm == 0:
        return np.zeros(len(s))
    return -math.expm1(-norm) * (np.asarray(s, np.float64) / norm)


def squash_jacobian(s):
    """Computes dv_a / ds_b = f δ_ab + f' s_a s_b / n, where n = |s| and f = n / (1 + n²)."""
    s = np.asarray(s, np.float64)
    n = float(length(s))
    if n == 0:
        return np.zeros((len(s), len(s)))
    slope = (1 - n**2) / (1 + n**2) ** 2
    return n / (1 + n**2) * np.eye(len(s)) + slope * n * np.outer(s / n, s / n)


def squash_exp_jacobian(s):
    """Computes dv_a / ds_b = f δ_ab + f' s_a s_b / n, where n = |s| and f = (1 − e^−n) / n."""
    s = np.asarray(s, np.float64)
    n = float(length(s))
    if n == 0:
        return np.eye(len(s))
    shrunk = -math.expm1(-n)
    return shrunk / n * np.eye(len(s)) + (math.exp(-n) - shrunk / n) * np.outer(s / n, s / n)


@np.vectorize(signature="(i,k),(j,i,d,k)->(j,i,d)")
def predictions(u, weight):
    """Multiplies each input capsule by a matrix for each output capsule (eq. 2, right)."""
    u, weight = u.astype(np.float64), weight.astype(np.float64)
    u_hat = np.zeros(weight.shape[:3])
    for j in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            u_hat[j, i] = weight[j, i] @ u[i]
    return u_hat


def routing_state(u_hat, routings, bias=None, leak=False):
    """Routes (procedure 1): logits and couplings of the last iteration, and the capsules.

    With a leak, one more output capsule, whose logit stays 0, takes its share and is dropped, as
    in Sarasra/models, research/capsules.
    """
    bias = np.zeros((u_hat.shape[-3], u_hat.shape[-1])) if bias is None else bias
    return _route(u_hat, bias, routings, leak)


@np.vectorize(signature="(j,i,d),(j,d),(),()->(j,i),(j,i),(j,d)")
def _route(u_hat, bias, routings, leak):
    u_hat, bias = u_hat.astype(np.float64), bias.astype(np.float64)
    classes, inputs, dim = u_hat.shape
    b, c, v = np.zeros((classes, inputs)), np.zeros((classes, inputs)), np.zeros((classes, dim))
    for iteration in range(routings):
        for i in range(inputs):  # softmax over the output capsules, for every input capsule
            logits = [*b[:, i], 0] if leak else b[:, i]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            for j in range(classes):
                c[j, i] = weights[j] / sum(weights)
        for j in range(classes):
            s = bias[j].copy()
            for i in range(inputs):
                s += c[j, i] * u_hat[j, i]
            v[j] = squash(s)
        if iteration < routings - 1:
            for j in range(classes):
                for i in range(inputs):
                    b[j, i] += u_hat[j, i] @ v[j]
    return b, c, v


@np.vectorize(signature="(j,i,d),(j,i)->(j,d)")
def sum_of_votes(u_hat, couplings):
    """Sums the votes for each output capsule, weighted by couplings (eq. 2, left)."""
    s = np.zeros((u_hat.shape[0], u_hat.shape[2]))
    for j in range(u_hat.shape[0]):
        for i in range(u_hat.shape[1]):
            s[j] += couplings[j, i] * u_hat[j, i].astype(np.float64)
    return s


@np.vectorize(signature="(j,i,d),(j,i)->(j,d)")
def self_attention_routing(u_hat, bias):
    """Routes in one pass: votes attend to their sum (Mazzia, Salvetti, Chiaberge, 2021)."""
    u_hat = u_hat.astype(np.float64)
    classes, inputs, dim = u_hat.shape
    sums = sum_of_votes(u_hat, np.ones((classes, inputs)))
    couplings = np.zeros((classes, inputs))
    for i in range(inputs):
        logits = [u_hat[j, i] @ sums[j] / math.sqrt(dim) for j in range(classes)]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        for j in range(classes):
            couplings[j, i] = weights[j] / sum(weights)
    return squash_exp(sum_of_votes(u_hat, couplings + bias))


@np.vectorize(signature="(h,w,c),(p,q,c,o),()->(r,s,o)")
def conv(x, kernel, strides):
    """Convolves without padding, `strides` pixels from one output to the next."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    height, width, _ = x.shape
    p, q, _, channels = kernel.shape
    y = np.zeros(((height - p) // strides + 1, (width - q) // strides + 1, channels))
    for row in range(y.shape[0]):
        for column in range(y.shape[1]):
            top, left = row * strides, column * strides
            patch = x[top : top + p, left : left + q]
            for channel in range(channels):
                y[row, column, channel] = np.sum(patch * kernel[..., channel])
    return y


def primary_capsules(x, kernel, bias, dim, strides=2, grouping="channels", coupling=1.0):
    """Makes capsules of `dim` channels, at every position of the grid, of every type (§4)."""
    s = coupling * conv(x, kernel, strides) + np.asarray(bias, np.float64)
    group = {"channels": _group_channels, "flat": _group_flat}[grouping]
    return squash(group(s, np.zeros(dim)))


# A signature knows no numbers, so `capsule` is there for its length.
@np.vectorize(signature="(r,s,o),(k)->(i,k)")
def _group_channels(s, capsule):
    dim = len(capsule)
    rows, columns, channels = s.shape
    capsules = []
    for row in range(rows):
        for column in range(columns):
            for first in range(0, channels, dim):
                capsules.append([s[row, column, first + a] for a in range(dim)])
    return np.array(capsules)


@np.vectorize(signature="(r,s,o),(k)->(i,k)")
def _group_flat(s, capsule):
    rows, columns, channels = s.shape
    values = []
    for channel in range(channels):
        for row in range(rows):
            for column in range(columns):
                values.append(s[row, column, channel])
    dim = len(capsule)
    return np.array([values[first : first + dim] for first in range(0, len(values), dim)])


@np.vectorize(signature="(j,d),(j)->(n)")
def mask(capsules, kept):
    """Masks out all but the capsules of the right digits (§4.1)."""
    x = []
    for j in range(capsules.shape[0]):
        for number in capsules[j]:
            x.append(float(number) if kept[j] else 0.0)
    return np.array(x)


def longest(capsules):
    """Returns one-hot labels [..., j] of the longest capsule."""
    lengths = length(capsules)
    return np.eye(lengths.shape[-1])[lengths.argmax(-1)]


def perturb(capsules, offsets):
    """Changes one number of the capsules [j, d] by one offset, for each of [d, n] (figure 4)."""
    classes, dim = capsules.shape
    x = np.zeros((dim, len(offsets), classes, dim))
    for number in range(dim):
        for n, offset in enumerate(offsets):
            x[number, n] = capsules
            for j in range(classes):
                x[number, n, j, number] += offset
    return x


def decode(layers, x):
    """Applies fully connected layers, rectified, the last one with a sigmoid (figure 2)."""
    for layer, (kernel, bias) in enumerate(layers):
        x = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias)
        x = np.maximum(x, 0) if layer < len(layers) - 1 else 1 / (1 + np.exp(-x))
    return x


def max_pool(x, size):
    """Takes the largest of each size × size pixels; leaves out what fills no square."""
    rows, columns = (n // size for n in x.shape[-3:-1])
    y = np.zeros((*x.shape[:-3], rows, columns, x.shape[-1]))
    for row in range(rows):
        for column in range(columns):
            square = np.s_[row * size : (row + 1) * size, column * size : (column + 1) * size, :]
            y[..., row, column, :] = x[(..., *square)].max((-3, -2))
    return y


@np.vectorize(signature="(j),(j),(),(),()->()")
def margin_loss(lengths, present, m_plus, m_minus, down_weight):
    """Sums the margin loss over the classes (eq. 4)."""
    loss = 0.0
    for v, t in zip(lengths, present, strict=True):
        loss += t * max(0.0, m_plus - v) ** 2
        loss += down_weight * (1 - t) * max(0.0, v - m_minus) ** 2
    return loss


@np.vectorize(signature="(j),(j),()->()")
def spread_loss(activations, present, margin):
    """Sums the spread loss over pairs of a present and an absent class (Hinton et al., 2018)."""
    loss = 0.0
    for a_t, t in zip(activations, present, strict=True):
        for a_j, other in zip(activations, present, strict=True):
            loss += t * (1 - other) * max(0.0, margin - (a_t - a_j)) ** 2
    return loss


@np.vectorize(signature="(j),(j)->()")
def cross_entropy(logits, present):
    """Averages −log softmax over the present classes."""
    highest = max(logits)
    log_sum = highest + math.log(sum(math.exp(x - highest) for x in logits))
    losses = [log_sum - x for x, t in zip(logits, present, strict=True) if t]
    return sum(losses) / max(1, len(losses))


@np.vectorize(signature="(h,w,c),(h,w,c)->()")
def reconstruction_loss(reconstruction, image):
    """Averages the squared differences of the pixels."""
    loss = 0.0
    for index in np.ndindex(image.shape):
        loss += (float(reconstruction[index]) - float(image[index])) ** 2
    return loss / image.size


def caps_loss(present, lengths, images, reconstructions, lam_recon):
    """Adds the means of both losses."""
    margin = np.mean(margin_loss(lengths, present, 0.9, 0.1, 0.5))
    return margin + lam_recon * np.mean(reconstruction_loss(reconstructions, images))
