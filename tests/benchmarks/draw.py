"""Draw how cost grows, from the JSON that run.py sends; run by it, where matplotlib is installed."""

import json
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

data = json.load(sys.stdin)
plt.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "svg.hashsalt": "dbtool"})
figure, ((one, two), (three, four)) = plt.subplots(2, 2, figsize=(8, 5.2), constrained_layout=True)

one.bar([name for name, _ in data["inserts"]], [1000 * seconds for _, seconds in data["inserts"]], color="#4477aa", width=0.6)
one.set(title="one insert process", xlabel="rows in the file", ylabel="ms")

two.loglog(*zip(*data["queries"]), "o-", color="#4477aa")
two.set(title="query: all rows to CSV", xlabel="rows", ylabel="s")

three.loglog(*zip(*data["plans"]), "o-", color="#4477aa")
three.set(title="sweep: what is missing, of 100,000 rows", xlabel="runs wanted", ylabel="s")

counts, seconds = zip(*data["writers"])
four.semilogx(counts, [n / t for n, t in zip(counts, seconds)], "o-", color="#4477aa")
four.set(title="insert processes started at once", xlabel="processes", ylabel="rows/s", ylim=(0, None))

for axes in figure.axes:
    axes.grid(alpha=0.3)
figure.savefig(sys.argv[1], metadata={"Date": None})
