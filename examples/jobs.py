#!/usr/bin/env python3
"""Print a list of runs for sweep.py, one JSON object each: what a grid can't say, a program can.

    python3 jobs.py | python3 sweep.py results.db --params - -- python3 mlp.py --seed {sample}

Here, each network gets as many epochs as keep its cost about the same, and the smallest gets more samples.
"""

from __future__ import annotations

import json

BUDGET = 300  # weights times epochs
LAYERS = ("5", "10", "20", "10-10")
INPUTS = 10


def weights(layers: str) -> int:
    """Return how many weights, biases included, a network with these hidden layers and one output has."""
    sizes = [INPUTS, *map(int, layers.split("-")), 1]
    return sum((n + 1) * m for n, m in zip(sizes, sizes[1:]))


def main() -> None:
    for layers in LAYERS:
        job = {
            "layers": layers,
            "activation": "-".join(["tanh"] * len(layers.split("-"))),
            "sample_window_length": INPUTS,
            "epochs": max(1, BUDGET // weights(layers)),
        }
        print(json.dumps({**job, "samples": 3} if layers == LAYERS[0] else job))


if __name__ == "__main__":
    main()
