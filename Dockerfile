# The toolkit in a container; docs/container.md shows how it is built and run. CPU by default:
#     docker build -t upcycle3d .
# GPU: the index of your torch build, and the spconv wheel that belongs to its CUDA version:
#     docker build -t upcycle3d:gpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cuXXX --build-arg SPCONV=spconv-cuXXX .
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG SPCONV=
RUN python -m venv /opt/upcycle3d
ENV PATH=/opt/upcycle3d/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
# torch first and from its own index: from the usual one it would be a CUDA build of several gigabytes.
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE __init__.py __main__.py py.typed ./
COPY core core
COPY datasets datasets
COPY ops ops
COPY perception perception
COPY tools tools
RUN pip install --no-cache-dir -c constraints.txt . ${SPCONV}

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/upcycle3d /opt/upcycle3d
# Kernels are compiled on first use and kept in a folder that the user may write. Threads wait without spinning, as in the Makefile.
ENV PATH=/opt/upcycle3d/bin:$PATH \
    NUMBA_CACHE_DIR=/var/cache/upcycle3d \
    OMP_WAIT_POLICY=PASSIVE
RUN useradd --create-home --uid 1000 upcycle3d && install -d -m 1777 /var/cache/upcycle3d
USER 1000
WORKDIR /data
ENTRYPOINT ["upcycle3d"]
CMD ["--help"]
