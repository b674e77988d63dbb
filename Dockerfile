# The AlgoPerf harness and this submission in one image, for docker, buildah or podman:
#
#   docker build -t algoperf-shampoo .
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" \
#       -v ~/data:/data -v ~/experiment_runs:/experiment_runs algoperf-shampoo \
#       --workload ogbg --tuning_ruleset external
#
# Without a GPU, on plain Debian (TORCH_INDEX_URL may name an index of CPU-only wheels, which are
# far smaller):
#
#   docker build -t algoperf-shampoo-cpu --build-arg BASE_IMAGE=debian:bookworm-slim \
#       --build-arg HARNESS_EXTRAS=pytorch_cpu,jax_cpu,full .
#
# With a local checkout of the harness: put it into docker/harness/ (see ABOUT.md there).
# The defaults are the official image's: base, Python, torch and the harness at v0.6.

ARG BASE_IMAGE=nvidia/cuda:12.9.0-cudnn-devel-ubuntu20.04
FROM ${BASE_IMAGE}

# From here on, what changes least comes first.
ARG PYTHON_VERSION=3.11.10
ARG PIP_VERSION=24.3.1
# ffmpeg, pigz and unzip serve the harness's data set scripts.
ARG EXTRA_APT_PACKAGES="ffmpeg pigz unzip"
COPY docker/install_system.sh /opt/
RUN sh /opt/install_system.sh
ENV PATH=/opt/venv/bin:${PATH}

# torch, the largest layer, depends on its pin alone.
ARG TORCH_INDEX_URL=""
COPY docker/constraints.txt /opt/
RUN pip install --no-cache-dir --constraint /opt/constraints.txt \
        ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch torchvision

ARG HARNESS_REPOSITORY=https://github.com/mlcommons/algorithmic-efficiency.git
ARG HARNESS_REVISION=2c90454fc05d5bdf3598b0c7651e611f132a7060
ARG HARNESS_VERSION=0.6.0
ARG HARNESS_EXTRAS=pytorch_gpu,jax_cpu,full
COPY docker/install_harness.sh /opt/
COPY docker/harness/ /opt/harness/
RUN sh /opt/install_harness.sh

# Works for any user id: `docker run --user` of the owner of the mounted folders keeps their files
# that user's. USER has to be set because torch asks who is there, and such an id has no name.
# Some bases have a user of id 1000 already.
RUN useradd --create-home --non-unique --uid 1000 algoperf \
    && mkdir /data /experiment_runs \
    && chmod 1777 /home/algoperf /data /experiment_runs
ENV HOME=/home/algoperf USER=algoperf

# What changes with every commit comes last and installs nothing.
WORKDIR /opt/shampoo
ENV PYTHONPATH=/opt/shampoo
COPY docker/entrypoint.sh docker/
COPY workloads_smoke/ workloads_smoke/
COPY tuning_search_space.json LICENSE ./
COPY submission/ submission/
COPY shampoo_core/ shampoo_core/

USER algoperf
ENTRYPOINT ["bash", "/opt/shampoo/docker/entrypoint.sh"]
# A run of a minute that needs no data, to see that everything is in place.
CMD ["--workload", "mnist", "--offline_data", "true", "--num_tuning_trials", "1"]
