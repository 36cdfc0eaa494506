#!/usr/bin/env bash
# Snakemake runs this in the new conda environment, in the project's folder: the same steps as `make install`.
set -euo pipefail
pip install --quiet "$(grep '^torch==' envs/main.lock)"
pip install --quiet --no-deps --requirement envs/main.lock
pip install --quiet --no-deps --no-build-isolation --requirement envs/main-sdist.lock
pip install --quiet --no-deps --no-build-isolation --editable .
