# syntax=docker/dockerfile:1
#
# CPU:  docker build -t tidegate .
# CUDA: docker build -t tidegate:cuda --build-arg BASE_IMAGE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04 .
#
# Run with a read-only root: the state volume and a small /tmp are all that is written.
#   docker run --read-only --tmpfs /tmp -v tidegate-state:/var/lib/tidegate -v "$PWD/models:/models:ro" \
#     -p 8000:8000 -p 8001:8001 -p 8002:8002 tidegate
ARG BASE_IMAGE=python:3.11-slim-bookworm

# The base with Python 3.11 or newer and a UTF-8 locale: some text graphs need en_US.UTF-8 when they are loaded.
FROM ${BASE_IMAGE} AS base
RUN set -eu; \
    packages="locales"; \
    python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || packages="$packages python3 python3-venv"; \
    apt-get update; \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages; \
    rm -rf /var/lib/apt/lists/*; \
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; \
    sed -i 's/^# *en_US.UTF-8 UTF-8/en_US.UTF-8 UTF-8/' /etc/locale.gen; \
    locale-gen en_US.UTF-8
ENV LANG=en_US.UTF-8 \
    LC_ALL=en_US.UTF-8

FROM base AS build
WORKDIR /src
# The request path is compiled here. The interpreter of python:* has its headers; a distribution's has them apart.
RUN set -eu; \
    packages="gcc libc6-dev"; \
    python3 -c 'import sysconfig, os; os.stat(sysconfig.get_paths()["include"] + "/Python.h")' || packages="$packages python3-dev"; \
    apt-get update; \
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages; \
    rm -rf /var/lib/apt/lists/*; \
    python3 -m venv /opt/tidegate
# Dependencies first: a change of our own code leaves this layer as it is.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts scripts
RUN set -eu; \
    mkdir server router monitor; \
    TIDEGATE_COMPILE=0 /opt/tidegate/bin/python -m pip install --no-cache-dir -c constraints.txt '.[otlp]'; \
    /opt/tidegate/bin/python -m pip uninstall -y tidegate
COPY server server
COPY router router
COPY monitor monitor
RUN set -eu; \
    TIDEGATE_COMPILE=1 /opt/tidegate/bin/python -m pip install --no-cache-dir --no-deps -c constraints.txt .; \
    /opt/tidegate/bin/python -m compileall -q -j 0 /opt/tidegate

FROM base
RUN set -eu; \
    groupadd --gid 10001 tidegate; \
    useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/tidegate --shell /usr/sbin/nologin tidegate; \
    install -d -o 10001 -g 10001 /var/lib/tidegate; \
    install -d /models
COPY --from=build /opt/tidegate /opt/tidegate
# PYTHONSAFEPATH: a server.py in the working directory must not be taken for our package of that name.
ENV PATH=/opt/tidegate/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NUMBA_CACHE_DIR=/var/lib/tidegate/numba
USER 10001:10001
WORKDIR /var/lib/tidegate
VOLUME ["/var/lib/tidegate"]
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=2); c.request('GET', '/v2/health/ready'); sys.exit(c.getresponse().status != 200)"]
# Later flags win, so `docker run tidegate --http 0.0.0.0:80 config.yaml` changes what it names and keeps the rest.
ENTRYPOINT ["tidegate", "serve", "--http", "0.0.0.0:8000", "--grpc", "0.0.0.0:8001", "--metrics", "0.0.0.0:8002", "--state-dir", "/var/lib/tidegate"]
CMD ["--model-repository", "/models"]
