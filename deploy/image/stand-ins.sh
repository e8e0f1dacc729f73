#!/bin/sh
# Builds stand-ins for the public images in Dockerfile and docker-compose.yml from the Go, etcd,
# kube-apiserver and Prometheus of this machine, so that both files build and run where no image can
# be pulled. `make image-offline` calls it.
#
# A stand-in has the label io.etcd-kms-proxy.stand-in, whose value is a digest of its inputs. An image
# of the same name without the label was pulled: the script keeps and uses it.
# `make clean-image-offline` removes the stand-ins.
#
# Needs docker, Go with a filled module cache, apt-get (for a static busybox) and the binaries of
# `make tools` in ETCD_KMS_PROXY_BIN. The script skips stand-ins whose binaries are
# missing, with a message.
set -eu
cd "$(dirname "$0")/../.."
docker=${DOCKER:-docker}
bin=${ETCD_KMS_PROXY_BIN:-.bin}
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT

# The names are those that the files have as defaults.
go_image=$(sed -n 's/^ARG GO_IMAGE=//p' Dockerfile)
default() { sed -n "s/.*\${$1:-\([^}]*\)}.*/\1/p" docker-compose.yml 2>/dev/null | head -n 1; }

# have NAME OF: succeeds if the image was pulled, or is a stand-in with the same inputs.
have() {
	[ -n "$("$docker" images -q "$1")" ] || return 1
	case $("$docker" image inspect -f '{{index .Config.Labels "io.etcd-kms-proxy.stand-in"}}' "$1") in
	"$2") echo "$1: the stand-in is up to date" ;;
	"") echo "$1: there is an image of this name that is no stand-in: it is used" ;;
	*) return 1 ;;
	esac
}

# import NAME OF FOLDER [CHANGE...]: builds an image from a folder.
import() {
	name=$1 of=$2 folder=$3
	shift 3
	set -- --change "LABEL io.etcd-kms-proxy.stand-in=$of" "$@"
	tar -C "$folder" --owner=0 --group=0 -c . | "$docker" import "$@" - "$name" >/dev/null
	echo "$name: made of this machine's files"
}

# The compiler: Go, the modules of go.mod, a shell and the certificate authorities.
go_of=$({ go version; cat go.sum deploy/image/stand-ins.sh; } | sha256sum | cut -c 1-16)
if ! have "$go_image" "$go_of"; then
	root=$work/go
	mkdir -p "$root/bin" "$root/usr/local" "$root/etc/ssl/certs" "$root/go/pkg" "$root/tmp" "$work/busybox"
	if command -v busybox >/dev/null && ! ldd "$(command -v busybox)" >/dev/null 2>&1; then
		cp "$(command -v busybox)" "$root/bin/busybox"
	else
		(cd "$work/busybox" && apt-get download -q busybox-static >/dev/null 2>&1 && dpkg-deb -x busybox-static_*.deb .)
		cp "$work/busybox/bin/busybox" "$root/bin/busybox"
	fi
	for applet in sh cat chmod chown cp echo find ls mkdir rm sed touch; do ln -s busybox "$root/bin/$applet"; done
	cp -R "$(go env GOROOT)" "$root/usr/local/go"
	cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
	chmod 1777 "$root/tmp"
	GOFLAGS=-modcacherw GOMODCACHE=$root/go/pkg/mod GOPROXY="file://$(go env GOMODCACHE)/cache/download,$(go env GOPROXY)" GONOSUMDB='*' go mod download
	import "$go_image" "$go_of" "$root" \
		--change 'ENV PATH=/usr/local/go/bin:/bin GOPATH=/go GOTOOLCHAIN=local GOFLAGS=-mod=mod GOPROXY=off HOME=/tmp'
	chmod -R u+w "$root" && rm -rf "$root"
fi

# binaries NAME CHANGE PROGRAM=FILE...: an image of static binaries in /usr/local/bin.
binaries() {
	name=$1 change=$2
	shift 2
	[ -n "$name" ] || return 0
	of=
	for pair; do
		if ! [ -f "${pair#*=}" ]; then
			echo "$name: left out, since there is no ${pair#*=}" >&2
			return 0
		fi
		of=$of$(sha256sum <"${pair#*=}" | cut -c 1-16)
	done
	! have "$name" "$of" || return 0
	root=$work/image
	rm -rf "$root"
	mkdir -p "$root/usr/local/bin" "$root/tmp"
	chmod 1777 "$root/tmp"
	for pair; do
		cp -L "${pair#*=}" "$root/usr/local/bin/${pair%%=*}"
	done
	import "$name" "$of" "$root" --change 'ENV PATH=/usr/local/bin' --change "$change"
}
binaries "$(default ETCD_IMAGE)" 'CMD ["/usr/local/bin/etcd"]' "etcd=$bin/etcd-3.7" "etcdctl=$bin/etcdctl-3.7"
binaries "$(default KUBE_APISERVER_IMAGE)" 'CMD ["/usr/local/bin/kube-apiserver"]' "kube-apiserver=$bin/kube-apiserver"

# Prometheus is Debian's. Its binary is not static, so its libraries are copied too.
prometheus_image=$(default PROMETHEUS_IMAGE)
if [ -n "$prometheus_image" ]; then
	if ! command -v prometheus >/dev/null; then
		echo "$prometheus_image: left out, since Prometheus is not installed" >&2
	elif of=$(sha256sum <"$(command -v prometheus)" | cut -c 1-16) && ! have "$prometheus_image" "$of"; then
		root=$work/prometheus
		mkdir -p "$root/bin" "$root/prometheus" "$root/tmp"
		chmod 1777 "$root/tmp" "$root/prometheus"
		cp -L "$(command -v prometheus)" "$root/bin/prometheus"
		for lib in $(ldd "$root/bin/prometheus" | grep -o '/[^ ]*'); do
			mkdir -p "$root$(dirname "$lib")"
			cp -L "$lib" "$root$lib"
		done
		import "$prometheus_image" "$of" "$root" --change 'ENTRYPOINT ["/bin/prometheus"]' --change 'USER 65534' --change 'WORKDIR /prometheus'
	fi
fi
