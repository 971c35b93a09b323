#!/usr/bin/env bash
# Each start of this run: the exact command.

# start 1, 2026-11-23T15:14:13+00:00
(cd "$(dirname "$0")"/../.. && OMP_NUM_THREADS=2 /work/main/bin/train.py results/example_run configs/cnn.gin)
