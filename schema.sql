-- The columns of the results file, and the only place that names them.
-- The comment that ends a column's line is its description in `--help` and in `dbtool.py schema`.
CREATE TABLE results (
    id TEXT NOT NULL PRIMARY KEY DEFAULT (lower(
        printf('%012x', CAST((julianday('now') - 2440587.5) * 86400000 + 0.5 AS INTEGER))
        || hex(randomblob(10)))),              -- time-ordered: 12 hex digits of Unix milliseconds, then 20 random ones
    creation_ts TEXT NOT NULL
        DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),  -- when the row was made: UTC, ISO 8601
    author TEXT NOT NULL,                      -- who ran it
    algorithm TEXT NOT NULL,                   -- the program or model that was run, such as window_mlp
    activation TEXT NOT NULL,                  -- activation function of each layer, such as relu-linear-relu
    dataset TEXT NOT NULL,                     -- name of the series that was forecast
    forecast_length INTEGER NOT NULL,          -- samples predicted at once
    prediction_gap INTEGER NOT NULL,           -- samples left out between the window and the first one predicted
    training_window_length INTEGER NOT NULL,   -- latest samples trained on at each step
    sample_window_length INTEGER NOT NULL,     -- samples in one input window
    epochs INTEGER NOT NULL,                   -- passes over the training windows at each step
    layers TEXT NOT NULL,                      -- neurons of each hidden layer, such as 10-20-10
    rmse_global REAL,                          -- root mean square error over all predictions; NULL if the run diverged
    metadata TEXT NOT NULL DEFAULT '{}'        -- whatever else the run wants to say, as JSON
) WITHOUT ROWID;

-- The rows with what sweep.py notes in metadata as columns, so that nobody has to write json_extract.
CREATE VIEW runs AS SELECT *,
    json_extract(iif(json_valid(metadata), metadata, NULL), '$.sample') AS sample,        -- 1, 2, … of equal runs
    json_extract(iif(json_valid(metadata), metadata, NULL), '$.started') AS started,      -- UTC, ISO 8601
    json_extract(iif(json_valid(metadata), metadata, NULL), '$.seconds') AS seconds,      -- that it took
    json_extract(iif(json_valid(metadata), metadata, NULL), '$.host') AS host,            -- where it ran
    json_extract(iif(json_valid(metadata), metadata, NULL), '$.slot') AS slot,            -- which of the jobs at once
    json_extract(iif(json_valid(metadata), metadata, NULL), '$.slurm_job') AS slurm_job,
    json_extract(iif(json_valid(metadata), metadata, NULL), '$.git_commit') AS git_commit,
    json_extract(iif(json_valid(metadata), metadata, NULL), '$.git_dirty') AS git_dirty,  -- 1: changed since then
    json_extract(iif(json_valid(metadata), metadata, NULL), '$.command') AS command
FROM results;
