#!/usr/bin/env python3
"""A command of one's own: the best runs by any column.

    python3 leaderboard.py results.db rmse_global --best 5
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dbtool

parser = argparse.ArgumentParser(description="Print the runs with the smallest values of a column.")
parser.add_argument("database")
parser.add_argument("column")
parser.add_argument("--best", type=int, default=10, metavar="N", help="how many (default: 10)")
args = parser.parse_args()

schema = dbtool.read_schema()
column = dbtool.quote(args.column) if args.column in schema.by_name else args.column
sql = f"SELECT {column}, * FROM {dbtool.quote(schema.table)} WHERE {column} IS NOT NULL ORDER BY 1 LIMIT {args.best}"
raise SystemExit(dbtool.main(["query", args.database, sql, "--format", "table"]))
