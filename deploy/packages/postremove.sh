#!/bin/sh
# Keys are never removed: without them the values in etcd and in its backups are lost. The user
# stays too, so that files that it owns never belong to another one.
set -e
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
if [ "$1" = purge ] && [ -d /etc/etcd-kms-proxy ]; then
	rmdir /etc/etcd-kms-proxy/keys /etc/etcd-kms-proxy 2>/dev/null ||
		echo "etcd-kms-proxy: /etc/etcd-kms-proxy still holds files, keys perhaps; they are left in place" >&2
fi
