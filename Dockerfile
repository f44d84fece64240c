# The server, without weights: they are mounted at /model. EXTRA=cuda for a GPU.
FROM python:3.11-slim-bookworm

ARG EXTRA=cpu
# where pip finds torch; empty: where it finds everything else (its newest Linux wheels bring CUDA along)
ARG TORCH_INDEX_URL=

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache TRITON_CACHE_DIR=/cache/triton

# Triton compiles a helper in C at its first launch; Python.h is there, slim or not
# hadolint ignore=DL3008
RUN case "$EXTRA" in *cuda*) \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/* ;; esac

WORKDIR /src
COPY . .
# every version comes from constraints.txt
# hadolint ignore=DL3013
RUN pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' constraints.txt)" \
    && pip install -c constraints.txt ".[${EXTRA},serve,export]" \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin qvl \
    && mkdir /cache /model && chown qvl /cache

WORKDIR /
USER 10001
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# 0.0.0.0 is the container's own; without QVL_EDGE_API_KEY it refuses to start
ENTRYPOINT ["qvl-edge"]
CMD ["serve", "/model", "--host", "0.0.0.0"]
