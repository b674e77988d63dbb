#!/bin/sh
# Installs the harness, editable, from /opt/harness. Runs as root while the image is built.
#
# The checkout is the one that came from docker/harness/ if there is one, else that of
# HARNESS_REPOSITORY at HARNESS_REVISION. Environment also: HARNESS_EXTRAS, HARNESS_VERSION,
# TORCH_INDEX_URL.
set -eu

cd /opt/harness
if [ -f submission_runner.py ]; then
    echo "harness: the local checkout in docker/harness"
else
    echo "harness: $HARNESS_REPOSITORY at $HARNESS_REVISION"
    rm -f ABOUT.md
    git init --quiet
    git remote add origin "$HARNESS_REPOSITORY"
    git fetch --quiet --depth 1 origin "$HARNESS_REVISION"
    git checkout --quiet FETCH_HEAD
fi

# The version is usually read off git tags, which neither kind of checkout has here.
SETUPTOOLS_SCM_PRETEND_VERSION="$HARNESS_VERSION" pip install --no-cache-dir \
    --constraint /opt/constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} \
    --editable ".[$HARNESS_EXTRAS]" setuptools tensorflow-metadata importlib_resources

# Say now, not on the cluster, if something is missing.
pip check
python -c 'import torch, tensorflow_datasets; tensorflow_datasets.load; print(torch.__version__)'
