# syntax=docker/dockerfile:1
# An image to train in, for one or several NVIDIA GPUs, or for the tiny models on a CPU:
#
#   docker build -t glm_training .
#   docker run --rm --gpus all glm_training doctor
#   mkdir -p runs && chmod a+w runs      # where it does not exist Docker makes it, for root alone
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/work/runs" -v glm_cache:/cache \
#     glm_training train --config configs/quickstart.yaml
#
# The libraries are those of requirements.txt, which CI tested with this Python. What was tried of this file without
# Docker, and how: python -m tests.image --help, and what came of it: docs/compatibility.md
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
ARG UV=0.13.0

FROM ghcr.io/astral-sh/uv:${UV} AS uv

FROM ${BASE}
ARG PYTHON=3.11.14

# fonts: for letters of prompts on sheets of pictures; g++: what training.compile and triton call; tesseract: the engine pytesseract of text_accuracy
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates fonts-dejavu-core g++ git tesseract-ocr \
    && rm -rf /var/lib/apt/lists/*

# a Python of its own, whatever the base has; pip, so that what glm-train doctor says can be typed
ENV UV_PYTHON_INSTALL_DIR=/opt/python PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN --mount=from=uv,source=/uv,target=/bin/uv uv venv --seed --python ${PYTHON} /opt/venv

# libraries before code: they change seldom, and take most of the time
COPY requirements.txt /tmp/requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip pip install -r /tmp/requirements.txt pytesseract==0.3.13

WORKDIR /work
COPY pyproject.toml setup.py README.md LICENSE requirements.txt ./
COPY glm_training glm_training
RUN pip install --no-deps -e .
COPY train.py train_ar.py train_dit.py test_installation.py ./
COPY configs configs
COPY data data
COPY examples examples

# a user without rights; a mounted folder must be writable for its number, or name another by docker run --user
RUN useradd --create-home --uid 10001 trainer \
    && mkdir -p /cache/huggingface /cache/torch /work/runs \
    && chown -R trainer /cache /work/runs
ENV HF_HOME=/cache/huggingface TORCH_HOME=/cache/torch
USER trainer

ENTRYPOINT ["glm-train"]
CMD ["doctor"]
