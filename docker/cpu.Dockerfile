# The CPU image: docker build -f docker/cpu.Dockerfile -t moe_llm:cpu .
# TORCH_SPEC is what pip is given for torch. The default is the pinned version as the package index has it,
# which on x86 Linux brings CUDA libraries along; PyTorch's site names the index of its smaller CPU builds:
#   --build-arg TORCH_SPEC="torch==2.13.0 --index-url ..."
FROM python:3.11-slim-bookworm

# DeepSpeed compiles its CPU operators at first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
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
ENV HOME=/home/moe USER=moe DS_ACCELERATOR=cpu
USER 10001
ENTRYPOINT ["moe-llm"]
CMD ["--help"]
