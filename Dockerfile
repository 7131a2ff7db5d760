# The server in a container:
#
#     docker build -t reifusion .
#     docker run --rm -p 127.0.0.1:7861:7861 -e REIFUSION_TOKEN="$(openssl rand -hex 16)" reifusion
#
# compose.yaml says the same with folders for models, and keeps the token in a file.

FROM python:3.12-slim

# PyTorch for CPUs is a tenth as large as the one for CUDA. For a GPU:
#     docker build --build-arg TORCH_INDEX=https://pypi.org/simple -t reifusion .
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# With a compiler, attention on a CPU is a small kernel in C, which is built at the first start, into the cache.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# What changes rarely comes first, so that an edit of the code does not install PyTorch anew.
WORKDIR /opt/reifusion
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt --extra-index-url "$TORCH_INDEX" torch numpy Pillow

COPY pyproject.toml README.md LICENSE NOTICE ./
COPY recipes recipes
COPY reifusion reifusion
RUN pip install --no-cache-dir --constraint constraints.txt --extra-index-url "$TORCH_INDEX" ".[server]"

# The server writes to /tmp alone: that cache, and pictures that clients send, each for as long as its job lasts.
RUN useradd --create-home --uid 1000 reifusion && mkdir /models /loras
ENV XDG_CACHE_HOME=/tmp/cache
USER reifusion
WORKDIR /home/reifusion

# Models and LoRAs are looked up here by name. Only the listing is read, so the folders can be read-only.
VOLUME ["/models", "/loras"]
EXPOSE 7861

# A container that is not ready takes no requests; one that is not healthy should be started again.
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7861/healthz', timeout=4)"]

# Others can reach 0.0.0.0, so without a token the server does not start.
# `docker stop` sends SIGTERM: what is drawn gets 8 of the 10 seconds that Docker waits.
ENTRYPOINT ["reifusion", "serve", "--host", "0.0.0.0", "--models", "/models", "--loras", "/loras", "--grace", "8"]
