#!/bin/sh
# Gives a Debian or Ubuntu base what the harness needs: a compiler (torch.compile), git, Python 3.11
# with its headers, and a virtual environment in /opt/venv. Runs as root while the image is built.
#
# Python comes from the base if it is there, else from the distribution, else from source, as in
# the official image. Environment: PYTHON_VERSION (of the source), EXTRA_APT_PACKAGES, PIP_VERSION.
set -eu

export DEBIAN_FRONTEND=noninteractive
apt-get update
# shellcheck disable=SC2086  # a list of packages
apt-get install -y --no-install-recommends build-essential ca-certificates git $EXTRA_APT_PACKAGES

packaged=$(apt-cache policy python3.11 | awk '/Candidate:/ { print $2 }')
case "$packaged" in
    '' | '(none)' | *~rc* | *~a* | *~b*) packaged= ;;  # Ubuntu 22.04 has a release candidate only
esac

if command -v python3.11 > /dev/null; then
    echo "Python 3.11 comes with the base image"
elif [ -n "$packaged" ]; then
    apt-get install -y --no-install-recommends python3.11 python3.11-dev python3.11-venv
else
    apt-get install -y --no-install-recommends wget libbz2-dev libffi-dev liblzma-dev \
        libncurses5-dev libreadline-dev libsqlite3-dev libssl-dev zlib1g-dev
    cd /tmp
    wget "https://www.python.org/ftp/python/$PYTHON_VERSION/Python-$PYTHON_VERSION.tgz"
    tar -xzf "Python-$PYTHON_VERSION.tgz"
    cd "Python-$PYTHON_VERSION"
    ./configure --enable-optimizations
    make -j"$(nproc)"
    make altinstall
    cd /  # pip needs a working directory that is there
    rm -rf /tmp/Python-*
fi
rm -rf /var/lib/apt/lists/*

python3.11 -m venv /opt/venv
/opt/venv/bin/pip install --no-cache-dir "pip==$PIP_VERSION"
