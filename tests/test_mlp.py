"""The example program: a result that fits the schema, better than the naive forecast, and honest when it diverges."""

import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT

import dbtool

MLP = str(ROOT / "examples" / "mlp.py")


def run(*arguments):
    return subprocess.run([sys.executable, MLP, *arguments], capture_output=True, text=True, check=False)


FAST = ["--epochs", "0"]


def test_default_run_beats_the_naive_forecast():
    done = run("--verbose")
    assert done.returncode == 0
    record = json.loads(done.stdout)
    assert set(record) == {column.name for column in dbtool.read_schema().columns if column.needed}
    naive = float(done.stderr.rsplit(" ", 1)[1])
    assert record["rmse_global"] < 0.7 * naive
    assert run().stdout == done.stdout


def test_flags_come_back_in_the_result():
    given = {"author": "me", "forecast_length": 2, "prediction_gap": 3, "training_window_length": 50,
             "sample_window_length": 7, "epochs": 0, "layers": "3-4", "activation": "relu-linear"}
    done = run(*(f"--{name}={value}" for name, value in given.items()))
    record = json.loads(done.stdout)
    assert {name: record[name] for name in given} == given and math.isfinite(record["rmse_global"])


def test_a_diverging_run_is_stored_as_null(expect_success, rows, db_path):
    done = run("--learning_rate", "1000", "--activation", "linear")
    assert math.isnan(json.loads(done.stdout)["rmse_global"])
    expect_success("insert", db_path, stdin=done.stdout.encode())
    assert rows(db_path, "SELECT rmse_global IS NULL FROM results") == [["1"]]


@pytest.mark.parametrize(("arguments", "said"), [
    (["--layers", "10-x"], "--layers takes"), (["--layers", "1-2"], "--activation takes"),
    (["--activation", "gelu"], "--activation takes"), (["--dataset", "none"], "No such file"),
    (["--training_window_length", "5"], "--training_window_length must be at least 11"),
    (["--training_window_length", "500"], "the series has 309 samples"), (["--sample_window_length", "0"], "positive"),
])
def test_wrong_parameters(arguments, said):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "") and said in done.stderr and done.stderr.count("\n") == 1


def test_help_tells_what_each_column_means():
    text = run("--help").stdout
    assert all(f"--{name} " in text for name in json.loads(run(*FAST).stdout) if name not in ("algorithm", "rmse_global"))
