# A service on a CPU:  docker build -t fasttx . && docker run -p 8000:8000 -v RUN:/run/model:ro fasttx
FROM python:3.12-slim AS build
# Any g++ will do.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/fasttx \
    && /opt/fasttx/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu \
        -c constraints.txt ".[serve]"

FROM python:3.12-slim
RUN useradd --system --uid 10001 --no-create-home fasttx
COPY --from=build /opt/fasttx /opt/fasttx
USER 10001
ENV PATH=/opt/fasttx/bin:$PATH PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
ENTRYPOINT ["fasttx", "serve", "--host", "0.0.0.0"]
CMD ["/run/model"]
