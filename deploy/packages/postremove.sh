#!/bin/sh
# Keys are never removed: without them the values in etcd and in its backups are lost. The user stays
# too, so that its files never belong to another user who gets the same number.
set -e
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
if [ "$1" = purge ]; then
	# dpkg may have removed the empty folder of keys already.
	rmdir /etc/etcd-kms-proxy/keys 2>/dev/null || true
	rmdir /etc/etcd-kms-proxy 2>/dev/null || true
	if [ -d /etc/etcd-kms-proxy ]; then
		echo "etcd-kms-proxy: /etc/etcd-kms-proxy is left in place, since it is not empty: it may hold keys" >&2
	fi
fi
