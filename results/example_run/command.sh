#!/usr/bin/env bash
# Each start of this run: the exact command.

# start 1, 2026-11-24T14:20:38+00:00
(cd "$(dirname "$0")"/../.. && OMP_NUM_THREADS=2 bin/train.py results/example_run configs/cnn.gin)
