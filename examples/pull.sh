#!/usr/bin/env bash
# Fetch the rows that a results file on another host has and this one's has not, and nothing else.
#
#     REMOTE="ssh node1" ./pull.sh results.db results.db          rows newer than the newest one here
#     REMOTE="ssh node1" ./pull.sh results.db results.db --all    every missing row, also one that came late
#
# Late are rows whose id is older than their arrival there: kept and retried, merged from a third
# file, or made while a clock was wrong. Run it with --all now and then: it fetches all ids first.
set -euo pipefail
far=$1 near=$2 all=${3:-}
dbtool=${DBTOOL:-python3 dbtool.py}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

fetch() { # the answer to the SQL on standard input, compressed on the way; its last line tells that it is whole
    $REMOTE "($dbtool query '$far' - --no-header $* && echo end) | gzip" | gunzip >"$scratch/answer"
    [ "$(tail -n 1 "$scratch/answer")" = end ] || return 1
    sed '$d' "$scratch/answer"
}
ids() { $dbtool query "$near" "$1" --no-header; }

if [ ! -e "$near" ]; then
    echo "SELECT * FROM results" | fetch --format jsonl >"$scratch/rows"
elif [ "$all" != --all ]; then
    newest=$(ids "SELECT max(id) FROM results")
    echo "SELECT * FROM results WHERE id > '${newest//\"/}'" | fetch --format jsonl >"$scratch/rows"
else
    echo "SELECT id FROM results ORDER BY id" | fetch >"$scratch/far"
    ids "SELECT id FROM results ORDER BY id" >"$scratch/near"
    LC_ALL=C comm -23 "$scratch/far" "$scratch/near" | split -l 10000 - "$scratch/missing."
    for part in "$scratch"/missing.*; do
        [ -e "$part" ] || continue
        echo "SELECT * FROM results WHERE id IN ('$(paste -sd, "$part" | sed "s/,/','/g")')" | fetch --format jsonl
    done >"$scratch/rows"
fi
[ ! -s "$scratch/rows" ] || $dbtool insert "$near" --on-conflict skip <"$scratch/rows"
