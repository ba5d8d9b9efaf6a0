# The CUDA image: docker build -f docker/cuda.Dockerfile -t moe_llm:cuda .
# The base has nvcc, with which DeepSpeed compiles operators at first use; its CUDA version has to be that of
# the torch build (13.0 for torch 2.13.0). The host's driver must support it.
ARG CUDA_VERSION=13.0.1
FROM nvidia/cuda:${CUDA_VERSION}-devel-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

ENV PATH=/opt/venv/bin:$PATH CUDA_HOME=/usr/local/cuda \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /opt/moe_llm

# From the slowest and most stable layer to the one that changes with every commit.
ARG TORCH_SPEC="torch==2.13.0"
# hadolint ignore=DL3013,SC2086
RUN pip install ${TORCH_SPEC}

COPY pyproject.toml docker/constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

COPY README.md LICENSE ./
# the wheel holds the configurations too
COPY configs configs
COPY moe_llm moe_llm
# hadolint ignore=DL3013
RUN pip install --no-deps . && rm -rf moe_llm build
COPY scripts scripts

# Any user may run it, so that files in a mounted run directory belong to whoever started it. Such a user has
# no entry in /etc/passwd, and what looks the name up finds USER.
RUN useradd --create-home --uid 10001 moe \
    && mkdir runs \
    && chmod 1777 /home/moe runs
ENV HOME=/home/moe USER=moe
USER 10001
ENTRYPOINT ["moe-llm"]
CMD ["--help"]
