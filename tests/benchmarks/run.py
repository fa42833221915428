#!/usr/bin/env python3
"""Compare dbtool.py and sweep.py with what one would use instead, and print a Markdown table.

    python3 tests/benchmarks/run.py --quick      # under two minutes, smaller data
    python3 tests/benchmarks/run.py --write      # all of it, and put tables and picture into the README

It makes its own data, installs its peers in tests/benchmarks/.venv (sqlite-utils, pandas, duckdb,
matplotlib), and takes sqlite3 and GNU parallel from the system. Each pair runs alternately, A B A B;
a ratio is the median of the pairs' ratios, so that a machine whose speed drifts does not matter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

import dbtool  # noqa: E402

PYTHON = getattr(sys, "_base_executable", sys.executable)  # a venv's Python starts more slowly
DBTOOL, SWEEP = [PYTHON, str(ROOT / "dbtool.py")], [PYTHON, str(ROOT / "sweep.py")]
MODULE = [PYTHON, "-m", "dbtool"]  # run from ROOT, where Python finds it
PEERS = HERE / ".venv"
PACKAGES = ["sqlite-utils", "pandas", "duckdb", "matplotlib"]
RECORD = {"author": "Philip", "algorithm": "window_mlp", "activation": "relu-linear-relu", "dataset": "no_data",
          "forecast_length": 1, "prediction_gap": 1, "training_window_length": 100, "sample_window_length": 10,
          "epochs": 25, "layers": "10-20-10", "rmse_global": 0.123456789}
GRID = ["-p", "epochs=25..400..25", "-p", "training_window_length=20..100..10", "-p",
        "sample_window_length=10..100..10", "-p", "layers=5,10,20,10-20-10", "-p", "activation=relu,tanh",
        "-p", "dataset=a,b,c,d,e,f,g,h,i", "--where", "sample_window_length < training_window_length"]

# What a user would write by hand. It does the same: creates the table, in WAL mode, one commit.
ONE_INSERT = """
import json, sqlite3, sys
record = json.load(sys.stdin)
db = sqlite3.connect(sys.argv[1])
db.execute("PRAGMA journal_mode=WAL")
db.execute("INSERT INTO results (%s) VALUES (%s)" % (", ".join(record), ", ".join("?" * len(record))), list(record.values()))
db.commit()
"""
MANY_INSERTS = """
import json, sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute("PRAGMA journal_mode=WAL")
db.executescript(open(sys.argv[2]).read())
names = sys.argv[3].split()
db.executemany("INSERT INTO results (%s) VALUES (%s)" % (", ".join(names), ", ".join(":" + name for name in names)),
               (json.loads(line) for line in sys.stdin))
db.commit()
"""
PANDAS = """
import sqlite3, sys, pandas
pandas.read_sql("SELECT * FROM results", sqlite3.connect(sys.argv[1])).to_csv(sys.stdout, index=False)
"""
DUCKDB_LOAD = """
import sys, duckdb
duckdb.connect(sys.argv[1]).sql("CREATE TABLE results AS SELECT * FROM read_csv('%s')" % sys.argv[2])
"""
DUCKDB = """
import sys, duckdb
duckdb.connect(sys.argv[1], read_only=True).sql("COPY results TO '/dev/stdout' (HEADER)")
"""


class Row(NamedTuple):
    """One line of the table: what was measured, ours and theirs, how they compare, and whether the goal is met."""

    what: str
    ours: str
    against: str
    theirs: str
    ratio: str
    goal: str
    met: bool | None


def run(command: Sequence[str], stdin: Path | None = None) -> float:
    """Run a command that must succeed; return its wall time in seconds."""
    with open(stdin or os.devnull, "rb") as source:
        began = time.perf_counter()
        done = subprocess.run(command, stdin=source, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}: {done.stderr.decode()[-500:]}")
    return seconds


def peak(command: Sequence[str], stdin: Path | None = None) -> float:
    """Return the peak memory of a command in MiB. A small process starts it: Linux counts the parent's at the fork."""
    code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    with open(stdin or os.devnull, "rb") as source:
        done = subprocess.run([PYTHON, "-S", "-c", code, *command], stdin=source, capture_output=True, check=True)
    return int(done.stdout) / 1024


def show(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:,.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


class Benchmarks:
    """The data in a folder of its own, and the rows of the table so far."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.rows: list[Row] = []
        self.few, self.many = (2, 10) if quick else (7, 40)
        self.lines = 60_000 if quick else 300_000
        self.record = folder / "record.json"
        self.record.write_text(json.dumps(RECORD))
        self.jsonl = self.json_lines_file(self.lines)
        self.full = self.fresh("full.db")
        run([*DBTOOL, "insert", self.full], self.jsonl)

    def json_lines_file(self, count: int) -> Path:
        path = self.folder / f"{count}.jsonl"
        with open(path, "w") as file:
            file.writelines(json.dumps({**RECORD, "epochs": i % 400, "rmse_global": i / 7}) + "\n" for i in range(count))
        return path

    def fresh(self, name: str) -> str:
        """Return a path in the folder where there is no file."""
        for old in self.folder.glob(f"{name}*"):
            old.unlink()
        return str(self.folder / name)

    def filled(self, name: str, count: int) -> str:
        """Return a results file with *count* rows, made by SQLite itself."""
        path = self.fresh(name)
        run([*DBTOOL, "insert", path], self.record)
        with contextlib.closing(sqlite3.connect(path)) as db:
            names = ", ".join(RECORD)
            db.execute(f"""WITH RECURSIVE n(i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
                INSERT INTO results (id, {names}) SELECT printf('%032x', i), {names} FROM n, results""", [count])
            db.commit()
        return path

    def compare(self, what: str, against: str, times: int, ours: Callable[[], float], theirs: Callable[[], float],
                at_most: float = 0.0, at_least: float = 0.0) -> None:
        """Add a row: how long ours takes by theirs (goal *at_most*), or how many times faster it is (*at_least*).

        Both run alternately, after one unmeasured run of each.
        """
        ours()
        theirs()
        pairs = [(ours(), theirs()) for _ in range(times)]
        ratio = statistics.median(a / b for a, b in pairs)
        if at_least:
            text, goal, met = f"{1 / ratio:.3g} times its speed", f"≥ {at_least:g}", 1 / ratio >= at_least
        else:
            text = f"{ratio:.3g} times its time"
            goal, met = (f"≤ {at_most:g}", ratio <= at_most) if at_most else ("", None)
        self.add(what, show(statistics.median(a for a, _ in pairs)), against,
                 show(statistics.median(b for _, b in pairs)), text, goal, met)

    def add(self, *row: Any) -> None:
        self.rows.append(Row(*row))
        print(" | ".join(map(str, row)), file=sys.stderr)

    # What follows measures what its name says.

    def one_insert(self) -> None:
        what = "one insert process"
        ours_db, their_db, utils_db = (self.filled(name, 1) for name in ("a.db", "b.db", "u.db"))

        def ours() -> float:
            return run([*DBTOOL, "insert", ours_db], self.record)

        def minimal() -> float:
            return run([PYTHON, "-c", ONE_INSERT, their_db], self.record)

        self.compare(what, "a minimal script", self.many, ours, minimal, at_most=1.25)
        self.compare(f"{what}, by `python3 -m dbtool`", "a minimal script", self.many,
                     lambda: run([*MODULE, "insert", ours_db], self.record), minimal, at_most=1.25)
        if shutil.which("sqlite3"):
            values = ", ".join(f"json_extract(j, '$.{name}')" for name in RECORD)
            sql = f"INSERT INTO results ({', '.join(RECORD)}) SELECT {values} FROM (SELECT readfile('{self.record}') AS j)"
            self.compare(what, "`sqlite3`, readfile and json_extract", self.many, ours,
                         lambda: run(["sqlite3", their_db, sql]))
        self.compare(what, "`sqlite-utils insert`", self.few, ours,
                     lambda: run([peer("sqlite-utils"), "insert", utils_db, "results", "-"], self.record), at_least=5)

    def json_lines(self) -> None:
        what = f"{self.lines:,} JSON Lines"

        def ours() -> float:
            return run([*DBTOOL, "insert", self.fresh("a.db")], self.jsonl)

        self.compare(what, "a bare `json.loads` and `executemany` loop", self.few, ours, lambda: run(
            [PYTHON, "-c", MANY_INSERTS, self.fresh("b.db"), str(ROOT / "schema.sql"), " ".join(RECORD)], self.jsonl),
            at_least=0.9)
        self.compare(what, "`sqlite-utils insert --nl`", self.few // 2, ours, lambda: run(
            [peer("sqlite-utils"), "insert", self.filled("u.db", 1), "results", "-", "--nl"], self.jsonl), at_least=3)
        memory = peak([*DBTOOL, "insert", self.fresh("a.db")], self.jsonl)
        self.add(f"{what}: memory", f"{memory:.0f} MiB", "", "", "", "≤ 48 MiB", memory <= 48)

    def to_csv(self) -> None:
        what, sql = f"{self.lines:,} rows × 14 columns to CSV", "SELECT * FROM results"

        def ours() -> float:
            return run([*DBTOOL, "query", self.full, sql])

        if shutil.which("sqlite3"):
            self.compare(what, "C `sqlite3 -csv`, which rounds floats", self.few, ours,
                         lambda: run(["sqlite3", "-csv", "-header", self.full, sql]), at_most=2.2)
        # DuckDB's extension for SQLite files must be fetched from the Internet; its own file is the best case for it.
        exported, duck = self.fresh("full.csv"), self.fresh("full.duckdb")
        run([*DBTOOL, "query", self.full, sql, "--output", exported])
        run([peer("python"), "-c", DUCKDB_LOAD, duck, exported])
        for name, at_least, command in [
                ("`sqlite-utils query --csv`", 2.5, [peer("sqlite-utils"), "query", self.full, sql, "--csv"]),
                ("pandas", 4, [peer("python"), "-c", PANDAS, self.full]),
                ("DuckDB, from a file of its own format", 0, [peer("python"), "-c", DUCKDB, duck])]:
            self.compare(what, name, max(3, self.few // 2), ours, lambda command=command: run(command), at_least=at_least)
        memory = peak([*DBTOOL, "query", self.full, sql])
        self.add(f"{what}: memory", f"{memory:.0f} MiB", "", "", "", "≤ 32 MiB", memory <= 32)

    def many_writers(self) -> None:
        seconds, stored, refused = self.writers(200)
        self.add("200 processes at once into a file that is not there", f"{stored} rows, {refused} refused",
                 "", show(seconds), "", "200 rows, none refused", (stored, refused) == (200, 0))

    def writers(self, count: int) -> tuple[float, int, int]:
        """Let processes insert at once into a file that does not exist yet; return seconds, rows, and how many failed."""
        path = self.fresh("w.db")
        began = time.perf_counter()
        started = [subprocess.Popen([*DBTOOL, "insert", path], stdin=open(self.record), stderr=subprocess.PIPE)
                   for _ in range(count)]
        refused = sum(process.wait() != 0 for process in started)
        seconds = time.perf_counter() - began
        return seconds, rows_of(path), refused

    def into_many_rows(self) -> None:
        count = 1_000_000 if self.quick else 10_000_000
        large, empty = self.filled("large.db", count), self.filled("a.db", 1)
        self.compare(f"an insert into {count:,} rows", "into an empty file", self.many,
                     lambda: run([*DBTOOL, "insert", large], self.record),
                     lambda: run([*DBTOOL, "insert", empty], self.record), at_most=1.2)

    def plan(self) -> None:
        wanted, there = 518_400, 300_000
        path = self.swept("plan.db", there)
        times = [run([*SWEEP, path, *GRID, "--samples", "10", "--dry-run"]) for _ in range(self.few)]
        ours, sample = statistics.median(times), 20
        sql = "SELECT count(*) FROM results WHERE epochs = 25 AND layers = '5' AND dataset = 'a'"
        theirs = statistics.median(run([*DBTOOL, "query", path, sql]) for _ in range(sample)) * wanted / 10
        self.add(f"what is missing of {wanted:,} runs, {there:,} rows there", show(ours),
                 f"one query for each of {wanted // 10:,} combinations ({sample} done, the rest extrapolated)",
                 f"{theirs / 3600:.2g} h", f"{theirs / ours:,.0f} times faster", "≤ 2 s", ours <= 2)
        memory = peak([*SWEEP, path, *GRID, "--samples", "10", "--dry-run"])
        self.add("the same: memory", f"{memory:.0f} MiB", "", "", "", "≤ 200 MiB", memory <= 200)

    def swept(self, name: str, there: int) -> str:
        """Return a results file with *there* random rows of the grid's 518,400 runs."""
        path = self.fresh(name)
        rng = random.Random(1)
        combinations = [(e, t, s, la, a, d) for e in range(25, 401, 25) for t in range(20, 101, 10)
                        for s in range(10, 101, 10) if s < t for la in ("5", "10", "20", "10-20-10")
                        for a in ("relu", "tanh") for d in "abcdefghi"]
        names = ("epochs", "training_window_length", "sample_window_length", "layers", "activation", "dataset")
        dbtool.insert(path, ({**RECORD, **dict(zip(names, values))}
                             for values in rng.sample([c for c in combinations for _ in range(10)], there)))
        return path

    def dispatch(self) -> None:
        if not shutil.which("parallel"):
            return
        count = 1000 if self.quick else 2000
        numbers = self.folder / "numbers"
        numbers.write_text("".join(f"{i}\n" for i in range(count)))
        schema = self.folder / "jobs.sql"
        schema.write_text("CREATE TABLE jobs (n INTEGER NOT NULL, loss REAL, metadata TEXT DEFAULT '{}');")
        self.compare(f"{count:,} trivial jobs, 4 at once, each result stored", "GNU parallel, which only runs `true`",
                     self.few, lambda: run([*SWEEP, self.fresh("j.db"), "--schema", str(schema), "-p", f"n=1..{count}",
                                            "--jobs", "4", "--", "echo", '{"n": {n}, "loss": 1}']),
                     lambda: run(["parallel", "-j4", "true"], numbers), at_least=3)

    def busy(self) -> None:
        """Measure which share of the slots' time jobs of uneven length (Pareto) fill, until the last one starts."""
        count, slots, rng = 60 if self.quick else 400, 8, random.Random(5)
        lengths = [min(5.0, 0.3 * rng.paretovariate(1.2)) for _ in range(count)]
        schema = self.folder / "jobs.sql"
        schema.write_text('CREATE TABLE jobs (seconds REAL NOT NULL, "from" REAL, "to" REAL);')
        job = 'from=$(date +%s.%N); sleep "$1"; echo "{\\"from\\": $from, \\"to\\": $(date +%s.%N)}"'
        path = self.fresh("busy.db")
        words = [*SWEEP, path, "--schema", str(schema), "-p", f"seconds={','.join(f'{t:.6f}' for t in lengths)}",
                 "--jobs", str(slots), "--", "sh", "-c", job, "sh", "{seconds}"]
        run(words)
        times = dbtool.query(path, 'SELECT "from", "to" FROM jobs')
        first, last = min(t["from"] for t in times), max(t["from"] for t in times)
        share = sum(min(t["to"], last) - t["from"] for t in times) / (slots * (last - first))
        self.add(f"{slots} slots, {count} uneven jobs: busy", f"{share:.1%}", "", "", "", "≥ 97 %", share >= 0.97)

    def start_up(self) -> list[list[str]]:
        """Return, for each script, what a start costs: compiling, and the modules that its commands import."""
        lines = []
        for name, words in [("dbtool.py insert", [*DBTOOL, "insert", self.filled("a.db", 1)]),
                            ("-m dbtool insert", [*MODULE, "insert", self.filled("b.db", 1)]),
                            ("dbtool.py query", [*DBTOOL, "query", self.full, "SELECT 1"]),
                            ("sweep.py --dry-run", [*SWEEP, self.full, "-p", "epochs=1", "--dry-run"])]:
            code = ("import sys, time; text = open(sys.argv[1]).read(); start = time.perf_counter();"
                    "compile(text, 'x', 'exec'); print(time.perf_counter() - start)")
            compiling = statistics.median(
                float(subprocess.run([PYTHON, "-S", "-c", code, words[1]], capture_output=True, check=True).stdout)
                for _ in range(self.many)) if words[1] != "-m" else 0
            with open(self.record) as source:
                said = subprocess.run([PYTHON, "-X", "importtime", *words[1:]], stdin=source, capture_output=True,
                                      text=True, check=True).stderr
            bare = subprocess.run([PYTHON, "-X", "importtime", "-c", ""], capture_output=True, text=True, check=True).stderr
            known = {line.split("|")[-1].strip() for line in bare.splitlines()}
            own = [line.split("|") for line in said.splitlines() if line.startswith("import time:")]
            new = [(part[2].strip(), int(part[0].split(":")[1])) for part in own[1:] if part[2].strip() not in known]
            total = statistics.median(run(words, self.record) for _ in range(self.many))
            lines.append([name, show(total), show(compiling), show(sum(us for _, us in new) / 1e6),
                          ", ".join(sorted({module.partition(".")[0] for module, _ in new}))])
        return lines

    def growth(self, picture: Path) -> None:
        """Measure how cost grows, and draw it."""
        top = 6 if self.quick else 7
        sizes = [10**n for n in range(5, top + 1)]
        inserts, queries = [("0", self.insert_time(self.filled("a.db", 1)))], []
        for size in sizes:
            path = self.filled("g.db", size)
            inserts.append((f"{size:.0e}", self.insert_time(path)))
            queries.append((size, run([*DBTOOL, "query", path, "SELECT * FROM results"])))
        plans = []
        path = self.swept("plan.db", 100_000)
        for wanted in (10_000, 100_000, 1_000_000):
            flags = ["-p", f"epochs=1..{wanted // 100}", "-p", "layers=" + ",".join(map(str, range(10))), "--samples", "10"]
            plans.append((wanted, run([*SWEEP, path, *flags, "--dry-run"])))
        writers = [(count, self.writers(count)[0]) for count in (1, 3, 10, 30, 100, 200, 400)]
        self.fresh("g.db")
        data = {"inserts": inserts, "queries": queries, "plans": plans, "writers": writers}
        print(json.dumps(data), file=sys.stderr)
        subprocess.run([peer("python"), str(HERE / "draw.py"), str(picture)], input=json.dumps(data), text=True, check=True)

    def insert_time(self, path: str) -> float:
        return statistics.median(run([*DBTOOL, "insert", path], self.record) for _ in range(self.many))


def rows_of(path: str) -> int:
    return int(dbtool.query(path, "SELECT count(*) AS n FROM results")[0]["n"])


def peer(name: str) -> str:
    return str(PEERS / "bin" / name)


def install_peers() -> None:
    done = PEERS / "installed"
    if not done.exists():
        subprocess.run([PYTHON, "-m", "venv", str(PEERS)], check=True)
        subprocess.run([peer("python"), "-m", "pip", "install", "-q", *PACKAGES], check=True)
        done.touch()


def versions() -> str:
    """Return what was measured on: machine, and versions of everything."""
    found = [f"Python {platform.python_version()}", f"SQLite {sqlite3.sqlite_version}"]
    listed = subprocess.run([peer("python"), "-m", "pip", "list", "--format=json"], capture_output=True, check=True)
    known = {package["name"].lower(): package["version"] for package in json.loads(listed.stdout)}
    found += [f"{name} {known[name]}" for name in PACKAGES if name in known]
    for program in ("sqlite3", "parallel"):
        if shutil.which(program):
            said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()
            found.append(f"sqlite3 command {said[0]}" if program == "sqlite3" else f"GNU parallel {said[2]}")
    with contextlib.suppress(OSError):
        model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        found.insert(0, f"{os.cpu_count()} CPUs ({model.partition(': ')[2]})")
    return ", ".join([f"{platform.system()} {platform.release().partition('-')[0]}", *found])


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def tables(rows: Sequence[Row], start_up: Sequence[Sequence[str]]) -> str:
    met = {True: "met", False: "**missed**", None: ""}
    goals = [[*row[:5], f"{row.goal}: {met[row.met]}" if row.goal else ""] for row in rows]
    return "\n".join([
        f"Measured on {versions()}.\n",
        markdown(["what", "here", "against", "there", "ratio", "goal"], goals),
        markdown(["start of", "in all", "compiling the script", "imports", "modules"], start_up)])


def write_readme(text: str) -> None:
    readme = ROOT / "README.md"
    before, begin, rest = readme.read_text().partition("<!-- benchmarks -->\n")
    _, end, after = rest.partition("<!-- end of benchmarks -->\n")
    if not begin or not end:
        raise SystemExit("README.md lacks the benchmarks' marks")
    readme.write_text(f"{before}{begin}{text}{end}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="smaller data, fewer repetitions: under two minutes")
    parser.add_argument("--write", action="store_true", help="put the tables and the picture into the README")
    parser.add_argument("--only", metavar="NAME", action="append", help="one of the measurements; may be repeated")
    options = parser.parse_args()
    install_peers()
    for name in ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"):  # as on a user's machine
        os.environ.pop(name, None)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        bench = Benchmarks(Path(folder), options.quick)
        for measure in (bench.one_insert, bench.json_lines, bench.to_csv, bench.many_writers, bench.into_many_rows,
                        bench.plan, bench.dispatch, bench.busy):
            if not options.only or measure.__name__ in options.only:
                measure()
        text = tables(bench.rows, bench.start_up())
        if not options.only:
            bench.growth(HERE / "growth.svg" if options.write else Path(folder) / "growth.svg")
    print(text)
    if options.write:
        write_readme(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
