# The image of etcd-kms-proxy: a static binary, a bundle of certificate authorities and nothing else.
#
#   make image                        builds it as users run it
#   docker build -t etcd-kms-proxy .  builds it without a version
#
# It builds with BuildKit and with Docker's older builder. GO_IMAGE may name a mirror; BASE_IMAGE may
# name another base for the result, such as gcr.io/distroless/static-debian12.
ARG GO_IMAGE=golang:1.26-bookworm
ARG BASE_IMAGE=scratch

# The compiler runs on the builder's own platform and cross-compiles. The older builder does not set
# BUILDPLATFORM, and "linux" is any of its own.
FROM --platform=${BUILDPLATFORM:-linux} ${GO_IMAGE} AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG TARGETOS
ARG TARGETARCH
ARG VERSION=unknown
RUN mkdir -p /rootfs/usr/local/bin \
 && CGO_ENABLED=0 GOOS=${TARGETOS:-linux} GOARCH=${TARGETARCH:-} \
    go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=${VERSION}" \
      -o /rootfs/usr/local/bin/etcd-kms-proxy ./cmd/etcd-kms-proxy

# A new volume gets the owner of the folder that it is first mounted on. The folders below /setup are
# for the setup job of docker-compose.yml. Every file gets the time of the commit, in seconds, so that
# one commit makes one image.
ARG SOURCE_DATE_EPOCH=0
RUN set -eu; cd /rootfs; umask 022; \
    mkdir -p etc/ssl/certs etc/etcd-kms-proxy var/log/etcd-kms-proxy setup tmp; \
    cp /etc/ssl/certs/ca-certificates.crt etc/ssl/certs/; \
    echo 'nonroot:x:65532:65532:nonroot:/:/sbin/nologin' >etc/passwd; \
    echo 'nonroot:x:65532:' >etc/group; \
    for name in ca etcd proxy client kubernetes etcd-1 etcd-2 etcd-3; do mkdir "setup/$name"; done; \
    chmod 0644 etc/passwd etc/group etc/ssl/certs/ca-certificates.crt; \
    chmod 0700 etc/etcd-kms-proxy var/log/etcd-kms-proxy setup/*; \
    chmod 1777 tmp; \
    chown -R 65532:65532 etc/etcd-kms-proxy var/log/etcd-kms-proxy setup; \
    find . -exec touch -d "@${SOURCE_DATE_EPOCH}" {} +

FROM ${BASE_IMAGE}
COPY --from=build /rootfs/ /
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="etcd-kms-proxy" \
      org.opencontainers.image.description="Encryption at rest in front of any etcd, with keys from a KMS" \
      org.opencontainers.image.source="https://github.com/etcd-kms-proxy/etcd-kms-proxy" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 65532:65532
EXPOSE 2379 9379
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["/usr/local/bin/etcd-kms-proxy", "healthcheck"]
# SIGTERM drains, for 10 seconds at most: let the engine wait longer, `docker stop --time 20`.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/etcd-kms-proxy"]
CMD ["serve"]
