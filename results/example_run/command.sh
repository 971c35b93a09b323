#!/usr/bin/env bash
# Each start of this run: the exact command.

# start 1, 2026-11-23T11:16:21+00:00
(cd "$(dirname "$0")"/../.. && bin/train.py results/example_run configs/cnn.gin)
