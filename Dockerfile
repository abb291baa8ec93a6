# megabatch for CPUs and NVIDIA GPUs; docs/clusters.md has the commands.
ARG BASE=python:3.12-slim
FROM ${BASE}

# A C compiler: for the compiled parts below, and for Triton, which compiles launchers at run time.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Empty: pip's default index, whose torch for Linux on x86-64 brings CUDA. Else the index of another build, as for CPUs.
ARG TORCH_INDEX=""
ARG EXTRAS="parquet,remote,safetensors"
COPY constraints.txt /build/
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint /build/constraints.txt torch
COPY pyproject.toml setup.py README.md LICENSE /build/
COPY src /build/src
RUN pip install --no-cache-dir --constraint /build/constraints.txt "/build[$EXTRAS]" && rm -r /build

RUN useradd --create-home --uid 1000 megabatch && mkdir /runs && chown megabatch /runs
USER megabatch
WORKDIR /runs
ENTRYPOINT ["megabatch"]
