#!/bin/sh
# Create the user that the service runs as, before files are given to its group.
set -e
if ! getent group etcd-kms-proxy >/dev/null; then
	groupadd --system etcd-kms-proxy
fi
if ! getent passwd etcd-kms-proxy >/dev/null; then
	useradd --system --gid etcd-kms-proxy --home-dir /nonexistent --no-create-home \
		--shell /usr/sbin/nologin --comment "etcd-kms-proxy" etcd-kms-proxy
fi
