#!/bin/sh
# The service is neither enabled nor started here: it needs a key and the addresses of etcd first.
# On an upgrade a running proxy is restarted, as Debian's and Fedora's services are.
set -e
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	systemctl try-restart etcd-kms-proxy.service
fi
