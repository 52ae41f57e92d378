"""Routings of poses and activations as loops in NumPy and float64, written from their papers.

Each function computes one example; `np.vectorize` loops over the leading axes.
"""

import itertools
import math

import numpy as np
from scipy.special import digamma


def gaussian(x, mean, variance):
    """Computes log N(x; μ, σ²)."""
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * math.pi * variance))


def softmax(logits):
    """Divides e^logits by their sum."""
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def log_sigmoid(x):
    """Computes log(1 / (1 + e^−x))."""
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


# Hinton, Sabour, Frosst, 2018, procedure 1, with λ as in google-research/capsule_em.
@np.vectorize(signature="(j,i,d),(i),(j),(j),(),(),(),()->(j,d),(j),(j,d),(j,i)")
def em_routing(votes, activations, beta_u, beta_a, routings, inverse_temperature, floor, mass):
    """Routes by expectation maximisation: poses, activations, variances, responsibilities."""
    classes, inputs, dim = votes.shape
    shares = np.full((classes, inputs), 1 / classes)
    mean, variance = np.zeros((classes, dim)), np.zeros((classes, dim))
    logits = np.zeros(classes)
    for step in range(routings):
        if step:  # E-step
            for i in range(inputs):
                densities = [
                    sum(gaussian(votes[j, i, d], mean[j, d], variance[j, d]) for d in range(dim))
                    for j in range(classes)
                ]
                scores = [log_sigmoid(logits[j]) + densities[j] for j in range(classes)]
                shares[:, i] = softmax(scores)
        for j in range(classes):  # M-step
            r = [shares[j, i] * activations[i] for i in range(inputs)]
            cost = 0.0
            for d in range(dim):
                mean[j, d] = sum(r[i] * votes[j, i, d] for i in range(inputs)) / sum(r)
                scatter = sum(r[i] * (votes[j, i, d] - mean[j, d]) ** 2 for i in range(inputs))
                variance[j, d] = scatter / sum(r) + floor
                cost += (beta_u[j] + math.log(math.sqrt(variance[j, d]))) * mass * sum(r)
            logits[j] = inverse_temperature * (1 - 0.95 ** (step + 1)) * (beta_a[j] - cost)
    activations = np.array([math.exp(log_sigmoid(logit)) for logit in logits])
    return mean, activations, variance, shares


# The same over windows: each child's responsibilities sum to 1 over the parents of all types at all
# positions that see it (Gritzman, 2019).
def conv_em_routing(
    poses, activations, weight, size, strides, beta_u, beta_a, routings, temperature, floor, mass
):
    """Routes poses [y, x, i, d] by EM: poses, activations, responsibilities of each window."""
    rows, columns, types, dim = poses.shape
    side = math.isqrt(dim)
    shape = tuple((n - size) // strides + 1 for n in (rows, columns)) + (len(weight),)
    votes: dict = {parent: {} for parent in np.ndindex(shape)}
    for (y, x, j), p, q, i in itertools.product(votes, range(size), range(size), range(types)):
        child = (strides * y + p, strides * x + q, i)
        pose = poses[child].reshape(side, side).T  # a pose is stored column by column
        votes[y, x, j][child] = (pose @ weight[j, (p * size + q) * types + i]).T.ravel()
    parents: dict = {child: [] for child in np.ndindex(rows, columns, types)}
    for parent, of_parent in votes.items():
        for child in of_parent:
            parents[child].append(parent)
    shares = {(p, child): 1 / len(some) for child, some in parents.items() for p in some}
    mean, variance = np.zeros((*shape, dim)), np.zeros((*shape, dim))
    logits = np.zeros(shape)
    for step in range(routings):
        for child, some in parents.items() if step else ():  # E-step
            scores = [
                log_sigmoid(logits[p]) + sum(gaussian(votes[p][child], mean[p], variance[p]))
                for p in some
            ]
            for p, share in zip(some, softmax(scores) if some else (), strict=True):
                shares[p, child] = share
        for p, of_parent in votes.items():  # M-step
            r = {child: shares[p, child] * activations[child] for child in of_parent}
            total = sum(r.values())
            mean[p] = sum(r[child] * of_parent[child] for child in r) / total
            scatter = sum(r[child] * (of_parent[child] - mean[p]) ** 2 for child in r)
            variance[p] = scatter / total + floor
            cost = sum(beta_u[p[2]] + np.log(np.sqrt(variance[p]))) * mass * total
            logits[p] = temperature * (1 - 0.95 ** (step + 1)) * (beta_a[p[2]] - cost)
    windows = np.array([[shares[p, child] for child in votes[p]] for p in votes])
    return mean, 1 / (1 + np.exp(-logits)), windows.reshape(*shape, -1)


# Ribeiro, Leontidis, Kollias, 2020, the diagonal case.
@np.vectorize(signature="(j,i,d),(i),(),(),(),()->(j,d),(j),(j,i)")
def variational_routing(votes, activations, routings, alpha0, kappa0, psi0):
    """Routes by variational Bayes: poses, evidence, responsibilities."""
    classes, inputs, dim = votes.shape
    shares = np.full((classes, inputs), 1 / classes)
    m, scale = np.zeros((classes, dim)), np.zeros((classes, dim))
    kappa, nu, alpha = np.zeros(classes), np.zeros(classes), np.zeros(classes)

    def log_pi(j):
        return digamma(alpha[j]) - digamma(sum(alpha))

    def log_precision(j):
        terms = sum(digamma((nu[j] - n) / 2) for n in range(dim))
        return terms + dim * math.log(2) - sum(math.log(scale[j, d]) for d in range(dim))

    def log_likelihood(j, i):
        distance = sum((votes[j, i, d] - m[j, d]) ** 2 / scale[j, d] for d in range(dim))
        expected = dim / kappa[j] + nu[j] * distance
        return log_precision(j) / 2 - dim / 2 * math.log(2 * math.pi) - expected / 2

    for step in range(routings):
        if step:
            rows = [
                softmax([log_pi(j) + log_likelihood(j, i) for j in range(classes)])
                for i in range(inputs)
            ]
            shares = np.array(rows).T
        for j in range(classes):
            r = [shares[j, i] * activations[i] for i in range(inputs)]
            count = sum(r)
            alpha[j], kappa[j], nu[j] = alpha0 + count, kappa0 + count, dim + 1 + count
            for d in range(dim):
                mu = sum(r[i] * votes[j, i, d] for i in range(inputs)) / count
                m[j, d] = count * mu / kappa[j]
                scatter = sum(r[i] * (votes[j, i, d] - mu) ** 2 for i in range(inputs))
                scale[j, d] = psi0 + scatter + kappa0 * count / kappa[j] * mu**2
    entropy = [
        (dim * math.log(2 * math.pi * math.e) - log_precision(j)) / 2 for j in range(classes)
    ]
    return m, np.array([-math.exp(log_pi(j)) * entropy[j] for j in range(classes)]), shares


# Hahn, Pyeon, Kim, 2019.
@np.vectorize(signature="(j,i,d),(i),(j,i)->(j,d),(j)")
def self_routing(votes, activations, logits):
    """Routes by the logits alone: poses and activations."""
    classes, inputs, dim = votes.shape
    shares = np.array([softmax(logits[:, i]) for i in range(inputs)]).T
    poses, active = np.zeros((classes, dim)), np.zeros(classes)
    for j in range(classes):
        total = sum(activations[i] * shares[j, i] for i in range(inputs))
        active[j] = total / sum(activations)
        for i in range(inputs):
            poses[j] += activations[i] * shares[j, i] / total * votes[j, i]
    return poses, active


# Tsai, Srivastava, Goh, Salakhutdinov, 2020, the sequential form.
@np.vectorize(signature="(j,i,d),(d),(d),()->(j,d)")
def attention_routing(votes, scale, offset, routings):
    """Routes by attention with a layer norm."""
    classes, inputs, dim = votes.shape
    couplings = np.full((classes, inputs), 1 / classes)
    v = np.zeros((classes, dim))
    for step in range(routings):
        if step:
            for i in range(inputs):
                logits = [votes[j, i] @ v[j] / math.sqrt(dim) for j in range(classes)]
                couplings[:, i] = softmax(logits)
        for j in range(classes):
            s = sum(couplings[j, i] * votes[j, i] for i in range(inputs))
            centred = s - sum(s) / dim
            v[j] = scale * centred / math.sqrt(sum(centred**2) / dim + 1e-5) + offset
    return v
