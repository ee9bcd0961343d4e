# The laboratory: what a clinic runs, and torch. For a GPU, build with TORCH_INDEX set to the wheels of your CUDA.
#   docker build -f deploy/images/trainer.Dockerfile -t busgen-cds-trainer:VERSION .
# Pin BASE by its digest in your own registry: a tag can move.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS built
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
COPY deploy/locks/train.txt /src/deploy/locks/train.txt
RUN python -m venv /opt/busgen \
 && /opt/busgen/bin/pip install --index-url ${TORCH_INDEX} torch==2.13.0 \
 && /opt/busgen/bin/pip install --no-deps --require-hashes -r /src/deploy/locks/train.txt
COPY pyproject.toml README.md LICENSE CHANGELOG.md SECURITY.md /src/
COPY dicom_sr_templates /src/dicom_sr_templates
COPY orthanc_plugin /src/orthanc_plugin
COPY busgen_cds /src/busgen_cds
RUN /opt/busgen/bin/pip install --no-deps /src

FROM ${BASE}
LABEL org.opencontainers.image.title="BUSGen-CDS trainer" \
      org.opencontainers.image.description="Trains and measures BUSGen-CDS models. Research software, not a medical device." \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=built /opt/busgen /opt/busgen
RUN groupadd --gid 10001 busgen \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin busgen \
 && install -d -o 10001 -g 10001 -m 0700 /site /runs
ENV PATH=/opt/busgen/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp BUSGEN_DATA=/data \
    BUSGEN_CDS_CONFIG=/site
USER 10001:10001
VOLUME ["/runs"]
WORKDIR /runs
STOPSIGNAL SIGTERM
ENTRYPOINT ["busgen-cds"]
CMD ["--help"]
