# One image for every service: the command picks them (`sagittal run ingest`).
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/sagittal && /opt/sagittal/bin/pip install --no-cache-dir 'uv>=0.5'
ENV VIRTUAL_ENV=/opt/sagittal UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY cli cli
COPY libs libs
COPY services services
RUN /opt/sagittal/bin/uv pip install --no-cache -c requirements.lock . && /opt/sagittal/bin/pip uninstall --yes uv

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="Sagittal" org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 sagittal \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/sagittal --shell /usr/sbin/nologin sagittal \
    && install -d -o 10001 -g 10001 /var/lib/sagittal /var/spool/sagittal
COPY --from=build /opt/sagittal /opt/sagittal
# Large instances are spooled to TMPDIR while they arrive; everything else on the file system may be read-only.
ENV PATH=/opt/sagittal/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    SAGITTAL_DATA=/var/lib/sagittal SAGITTAL_LOG_FORMAT=json TMPDIR=/var/spool/sagittal
WORKDIR /var/lib/sagittal
USER 10001:10001
EXPOSE 11112 8080
STOPSIGNAL SIGTERM
ENTRYPOINT ["sagittal"]
CMD ["--help"]
