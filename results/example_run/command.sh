#!/usr/bin/env bash
# Each start of this run: the exact command.

# start 1, 2026-11-25T23:52:59+00:00
(cd "$(dirname "$0")"/../.. && OMP_NUM_THREADS=2 ./bin/train.py results/first configs/cnn.gin)
