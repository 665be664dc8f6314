# The service as two images: docs/docker.md says how to build and run them.
#   docker build --target web .                              HTTP only, a small image
#   docker build --target worker --build-arg TORCH=cpu .     what prunes; TORCH=gpu for CUDA
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS base
# Debian keeps only the newest build of a package, so a version written here would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 llmprune \
 && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin llmprune \
 && install --directory --owner=llmprune --group=llmprune --mode=0700 /data
ENV PATH=/opt/llmprune/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LLMPRUNE_DATA_DIR=/data \
    HF_HOME=/data/hub

FROM base AS web-packages
COPY scripts/setup.sh /src/scripts/
COPY requirements-web.lock /src/
RUN --mount=type=cache,target=/root/.cache/pip \
    PARTS=web VENV=/opt/llmprune bash /src/scripts/setup.sh packages

FROM base AS worker-packages
ARG TORCH=cpu
COPY scripts/setup.sh /src/scripts/
COPY requirements-worker.lock /src/
RUN --mount=type=cache,target=/root/.cache/pip \
    PARTS=worker TORCH=${TORCH} VENV=/opt/llmprune bash /src/scripts/setup.sh packages

# llmprune goes in on top of the packages, so that new code is a thin layer over an unchanged one.
FROM base AS web
COPY --from=web-packages /opt/llmprune /opt/llmprune
COPY . /src
RUN PARTS=web VENV=/opt/llmprune bash /src/scripts/setup.sh llmprune && rm -r /src
USER 10001:10001
VOLUME /data
EXPOSE 8000
# http.client, because urllib would go through HTTP_PROXY.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", "\
import http.client, os; \
web = http.client.HTTPConnection('127.0.0.1', os.environ.get('LLMPRUNE_PORT', '8000'), timeout=4); \
web.request('GET', '/readyz'); \
raise SystemExit(web.getresponse().status != 200)"]
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["llmprune", "serve", "--no-worker", "--host", "0.0.0.0"]

FROM base AS worker
COPY --from=worker-packages /opt/llmprune /opt/llmprune
COPY . /src
RUN PARTS=worker VENV=/opt/llmprune bash /src/scripts/setup.sh llmprune && rm -r /src
# With GPUs, nvidia-smi has to be there: the worker counts them with it.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
VOLUME /data
HEALTHCHECK --interval=60s --timeout=30s --start-period=60s --retries=3 CMD ["llmprune", "worker", "--check"]
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["llmprune", "worker"]
