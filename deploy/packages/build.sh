#!/bin/sh
# Build the release of one version: build.sh VERSION EPOCH BIN DIST ARCH...
# `make packages` calls it. EPOCH is the time of the commit, in seconds, for every time stamp.
set -eu
version=$1 epoch=$2 bin=$3 dist=$4
shift 4
export SOURCE_DATE_EPOCH="$epoch" CGO_ENABLED=0 GOFLAGS=-buildvcs=false
[ -n "$version" ] || { echo "error: CHANGELOG.md has no version heading (## 0.1.0)" >&2; exit 1; }

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
mkdir -p "$stage/man" "$stage/completion"
go test -count=1 -run '^(TestManPages|TestCompletions)$' ./internal/cli \
	-man "$stage/man" -completion "$stage/completion" >/dev/null
gzip -9n "$stage"/man/*.1

for arch in "$@"; do
	name=etcd-kms-proxy_${version}_linux_${arch}
	root=$stage/$name
	mkdir -p "$root"
	GOOS=linux GOARCH=$arch go build -trimpath -ldflags "-s -w -X main.version=$version" \
		-o "$root/etcd-kms-proxy" ./cmd/etcd-kms-proxy
	cp -R "$stage/man" "$stage/completion" LICENSE README.md CHANGELOG.md docs deploy/systemd "$root"
	chmod -R u=rwX,go=rX "$root"
	tar -C "$stage" --sort=name --mtime="@$epoch" --owner=0 --group=0 --numeric-owner -cf - "$name" |
		gzip -9n >"$dist/$name.tar.gz"

	# The modules inside the binary, as it records them itself.
	"$bin/cyclonedx-gomod" bin -json -noserial -notimestamp -version "$version" -output "$dist/$name.cdx.json" "$root/etcd-kms-proxy"

	for packager in deb rpm; do
		ARCH=$arch VERSION=$version STAGE=$root "$bin/nfpm" package \
			--config deploy/packages/nfpm.yaml --packager $packager --target "$dist/"
	done
done
