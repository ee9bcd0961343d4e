# What a clinic runs: no torch, no compiler, no package manager's cache. Build it from the repository's root:
#   docker build -f deploy/images/clinic.Dockerfile -t busgen-cds:VERSION .
# Pin BASE by its digest in your own registry: a tag can move.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS built
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
COPY deploy/locks/clinic.txt /src/deploy/locks/clinic.txt
RUN python -m venv /opt/busgen \
 && /opt/busgen/bin/pip install --no-deps --require-hashes -r /src/deploy/locks/clinic.txt
COPY pyproject.toml README.md LICENSE CHANGELOG.md SECURITY.md /src/
COPY dicom_sr_templates /src/dicom_sr_templates
COPY orthanc_plugin /src/orthanc_plugin
COPY busgen_cds /src/busgen_cds
RUN /opt/busgen/bin/pip install --no-deps /src \
 && /opt/busgen/bin/python -m compileall -q /opt/busgen/lib \
 && /opt/busgen/bin/pip uninstall -y pip

FROM ${BASE}
LABEL org.opencontainers.image.title="BUSGen-CDS" \
      org.opencontainers.image.description="Clinical decision support for breast ultrasound. Research software, not a medical device." \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=built /opt/busgen /opt/busgen
RUN groupadd --gid 10001 busgen \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin busgen \
 && install -d -o 10001 -g 10001 -m 0700 /site
ENV PATH=/opt/busgen/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp BUSGEN_CDS_CONFIG=/site
USER 10001:10001
VOLUME ["/site"]
EXPOSE 11112 2762 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["busgen-cds"]
CMD ["serve"]
