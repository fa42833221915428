#!/usr/bin/env python3
"""Forecast a series with a small neural network that learns as it goes; print the result as one JSON object.

At each step the network is trained on the latest samples, cut into windows, and then predicts values
that it has not seen. Standard library only: the network is a multilayer perceptron trained by
stochastic gradient descent (Rumelhart, Hinton and Williams, Nature 323, 1986).

    python3 mlp.py --layers 10-20-10 --activation relu-linear-relu --epochs 5
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import sys
from operator import mul

# name: (function, its derivative given the function's value)
ACTIVATIONS = {
    "linear": (lambda x: x, lambda y: 1.0),
    "relu": (lambda x: x if x > 0 else 0.0, lambda y: 1.0 if y > 0 else 0.0),
    "tanh": (math.tanh, lambda y: 1.0 - y * y),
    "sigmoid": (lambda x: 0.5 + 0.5 * math.tanh(x / 2), lambda y: y * (1.0 - y)),
}


class Layer:
    """One fully connected layer; each neuron's weights end with its bias."""

    def __init__(self, inputs: int, outputs: int, activation: str, rng: random.Random) -> None:
        scale = math.sqrt(2.0 / (inputs + outputs))  # Glorot and Bengio, 2010
        self.weights = [[rng.gauss(0.0, scale) for _ in range(inputs)] + [0.0] for _ in range(outputs)]
        self.function, self.derivative = ACTIVATIONS[activation]

    def forward(self, inputs: list[float]) -> list[float]:
        self.inputs = [*inputs, 1.0]
        self.outputs = [self.function(sum(map(mul, neuron, self.inputs))) for neuron in self.weights]
        return self.outputs

    def backward(self, gradient: list[float], rate: float) -> list[float]:
        """Take the error's gradient by the outputs, learn from it, and return the one by the inputs."""
        deltas = [slope * self.derivative(y) for slope, y in zip(gradient, self.outputs)]
        below = [0.0] * len(self.inputs)
        for index, delta in enumerate(deltas):
            if delta:
                neuron, step = self.weights[index], rate * delta
                below = [b + delta * w for b, w in zip(below, neuron)]
                self.weights[index] = [w - step * x for w, x in zip(neuron, self.inputs)]
        return below[:-1]


class Network:
    """A multilayer perceptron with linear outputs."""

    def __init__(self, sizes: list[int], activations: list[str], rng: random.Random) -> None:
        functions = [*activations, "linear"]
        self.layers = [Layer(n, m, name, rng) for n, m, name in zip(sizes, sizes[1:], functions)]

    def predict(self, inputs: list[float]) -> list[float]:
        for layer in self.layers:
            inputs = layer.forward(inputs)
        return inputs

    def train(self, inputs: list[float], target: list[float], rate: float) -> None:
        gradient = [y - t for y, t in zip(self.predict(inputs), target)]
        for layer in reversed(self.layers):
            gradient = layer.backward(gradient, rate)


def forecast(series: list[float], args: argparse.Namespace) -> tuple[float, float]:
    """Return the RMSE of the network, and that of repeating the last value, over the same predictions."""
    rng = random.Random(args.seed)
    sizes = [args.sample_window_length, *map(int, args.layers.split("-")), args.forecast_length]
    network = Network(sizes, args.activation.split("-"), rng)
    reach = args.prediction_gap + args.forecast_length  # from the end of a window to its last target
    errors, naive_errors = [], []
    for now in range(args.training_window_length, len(series) - reach + 1):
        seen = series[:now]
        mean = sum(seen) / now
        spread = math.sqrt(sum((x - mean) ** 2 for x in seen) / now) or 1.0
        recent = [(x - mean) / spread for x in seen[-args.training_window_length:]]
        starts = list(range(len(recent) - args.sample_window_length - reach + 1))
        for _ in range(args.epochs):
            rng.shuffle(starts)
            for start in starts:
                end = start + args.sample_window_length
                network.train(recent[start:end], recent[end + args.prediction_gap:end + reach], args.learning_rate)
        truth = series[now + args.prediction_gap:now + reach]
        predicted = network.predict(recent[len(recent) - args.sample_window_length:])
        errors += [y * spread + mean - t for y, t in zip(predicted, truth)]
        naive_errors += [series[now - 1] - t for t in truth]
    return rmse(errors), rmse(naive_errors)


def rmse(errors: list[float]) -> float:
    """Return the root mean square, NaN if any error is not finite."""
    total = sum(e * e for e in errors)
    return math.sqrt(total / len(errors)) if math.isfinite(total) else math.nan


def read_series(dataset: str) -> list[float]:
    """Read the last column of a CSV file with a header: a path, or the name of a file beside this script."""
    beside = os.path.join(os.path.dirname(os.path.realpath(__file__)), dataset + ".csv")
    with open(beside if os.path.exists(beside) else dataset, newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        next(rows)
        return [float(row[-1]) for row in rows]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = result.add_argument
    add("--author", default="anonymous", help="who runs it")
    add("--dataset", default="sunspots-yearly", help="the series: a CSV file beside this script, or a path")
    add("--forecast_length", type=int, default=1, metavar="N", help="samples predicted at once")
    add("--prediction_gap", type=int, default=0, metavar="N", help="samples left out before the first one predicted")
    add("--training_window_length", type=int, default=100, metavar="N", help="latest samples trained on at each step")
    add("--sample_window_length", type=int, default=10, metavar="N", help="samples in one input window")
    add("--epochs", type=int, default=1, metavar="N", help="passes over the training windows at each step")
    add("--layers", default="10", metavar="N-N-...", help="neurons of each hidden layer")
    add("--activation", default="tanh", metavar="F-F-...",
        help=f"activation function of each hidden layer: {', '.join(ACTIVATIONS)}")
    add("--learning_rate", type=float, default=0.01, metavar="X", help="step of the gradient descent")
    add("--seed", type=int, default=0, metavar="N", help="of the random numbers; the same seed gives the same result")
    add("--verbose", action="store_true", help="also compare with repeating the last value, on standard error")
    return result


def check(args: argparse.Namespace, length: int) -> None:
    """Raise ValueError if the parameters don't go together with each other or with the series."""
    layers, activations = args.layers.split("-"), args.activation.split("-")
    if not all(n.isdecimal() and int(n) > 0 for n in layers):
        raise ValueError("--layers takes positive numbers, such as 10-20-10")
    if len(layers) != len(activations) or not set(activations) <= set(ACTIVATIONS):
        raise ValueError(f"--activation takes one of {', '.join(ACTIVATIONS)} for each of the {len(layers)} layers")
    if min(args.forecast_length, args.sample_window_length) < 1 or min(args.prediction_gap, args.epochs) < 0:
        raise ValueError("the lengths must be positive, the gap and the epochs not negative")
    shortest = args.sample_window_length + args.prediction_gap + args.forecast_length
    if args.training_window_length < shortest:
        raise ValueError(f"--training_window_length must be at least {shortest}: one window and its target")
    if args.training_window_length + args.prediction_gap + args.forecast_length > length:
        raise ValueError(f"the series has {length} samples, too few for the training window and one prediction")


def main() -> int:
    args = parser().parse_args()
    try:
        series = read_series(args.dataset)
        check(args, len(series))
    except (OSError, ValueError, IndexError) as error:
        print(f"mlp: {error}", file=sys.stderr)
        return 2
    error, naive = forecast(series, args)
    if args.verbose:
        print(f"mlp: RMSE {error:.2f}; repeating the last value: {naive:.2f}", file=sys.stderr)
    own = ("seed", "learning_rate", "verbose")
    result = {name: value for name, value in vars(args).items() if name not in own}
    print(json.dumps({"algorithm": "window_mlp", **result, "rmse_global": error}))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
