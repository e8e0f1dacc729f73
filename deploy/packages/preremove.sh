#!/bin/sh
# dpkg calls this with "remove" or "upgrade", rpm with the number of versions that will be left.
set -e
case "$1" in
remove | 0)
	if [ -d /run/systemd/system ]; then
		systemctl --no-reload disable --now etcd-kms-proxy.service etcd-kms-proxy.socket
	fi
	;;
esac
