#!/bin/sh
# The demo of `make run`: a real etcd and the proxy on loopback. It writes a value through the
# proxy, shows what a client reads and what etcd stores, and serves until Ctrl-C or until its
# terminal is closed. It needs the binaries that `make run` builds. Ports and folder can be set in
# the environment.
set -eu
cd "$(dirname "$0")/.."
bin=${ETCD_KMS_PROXY_BIN:-.bin}
dir=${DEMO_DIR:-.run}
etcd_port=${ETCD_PORT:-22379}
peer_port=${PEER_PORT:-22380}
proxy_port=${PROXY_PORT:-12379}
admin_port=${ADMIN_PORT:-19379}
key=/registry/secrets/default/db
secret=correct-horse-battery-staple

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
die() { printf 'error: %s\nhint: %s\n' "$1" "$2" >&2; exit 3; }
through() { "$bin/etcdctl-3.7" --endpoints="127.0.0.1:$proxy_port" "$@"; }
direct() { "$bin/etcdctl-3.7" --endpoints="127.0.0.1:$etcd_port" "$@"; }

etcd_pid= proxy_pid= owner=
stop() {
	trap - EXIT INT TERM
	trap '' HUP
	# The proxy first, so that it can finish what it has with etcd.
	for pid in $proxy_pid $etcd_pid; do
		kill "$pid" 2>/dev/null || continue
		wait "$pid" 2>/dev/null || :
	done
	[ -z "$owner" ] || rm -f "$dir/pid"
	exit "${1:-0}"
}
trap 'stop $?' EXIT
trap 'say "stopping"; stop 0' INT TERM
# The terminal was closed, so nothing can be printed. The proxy itself reloads at this signal.
trap 'stop 0' HUP

mkdir -p "$dir"
chmod 0700 "$dir"
# A second demo in the same folder would overwrite the configuration and the logs of the first one,
# and wait for its database.
if [ -f "$dir/pid" ] && kill -0 "$(cat "$dir/pid")" 2>/dev/null; then
	die "a demo is running in $dir, as process $(cat "$dir/pid")" "stop it, or set DEMO_DIR and the four ports too; if that process is another one, remove $dir/pid"
fi
owner=yes
echo $$ >"$dir/pid"
[ -f "$dir/key.yaml" ] || "$bin/etcd-kms-proxy" kms new-local-key "$dir/key.yaml"
cat >"$dir/config.yaml" <<CONFIG
apiVersion: etcd-kms-proxy.io/v1alpha1
kind: ProxyConfiguration
listeners:
- address: 127.0.0.1:$proxy_port
etcd:
  endpoints: [http://127.0.0.1:$etcd_port]
kms:
- name: demo
  local: {keyFile: key.yaml}
rules:
- prefix: /registry/secrets/
  writeWith: demo
admin: {address: 127.0.0.1:$admin_port}
CONFIG
"$bin/etcd-kms-proxy" config check --config "$dir/config.yaml"

say "starting etcd on 127.0.0.1:$etcd_port (log: $dir/etcd.log)"
"$bin/etcd-3.7" --name demo --data-dir "$dir/etcd" --log-level warn \
	--listen-client-urls "http://127.0.0.1:$etcd_port" --advertise-client-urls "http://127.0.0.1:$etcd_port" \
	--listen-peer-urls "http://127.0.0.1:$peer_port" --initial-advertise-peer-urls "http://127.0.0.1:$peer_port" \
	--initial-cluster "demo=http://127.0.0.1:$peer_port" >"$dir/etcd.log" 2>&1 &
etcd_pid=$!
say "starting etcd-kms-proxy on 127.0.0.1:$proxy_port (log: $dir/proxy.log)"
"$bin/etcd-kms-proxy" serve --config "$dir/config.yaml" >"$dir/proxy.log" 2>&1 &
proxy_pid=$!

tries=0
until through endpoint health >/dev/null 2>&1; do
	kill -0 "$etcd_pid" 2>/dev/null || { tail -n 3 "$dir/etcd.log" >&2; die "etcd stopped" "is port $etcd_port or $peer_port in use? set ETCD_PORT and PEER_PORT"; }
	kill -0 "$proxy_pid" 2>/dev/null || { tail -n 3 "$dir/proxy.log" >&2; die "etcd-kms-proxy stopped" "is port $proxy_port or $admin_port in use? set PROXY_PORT and ADMIN_PORT"; }
	tries=$((tries + 1))
	[ "$tries" -lt 60 ] || die "no answer through the proxy after a minute" "read $dir/proxy.log and $dir/etcd.log"
	sleep 1
done
kill -0 "$etcd_pid" 2>/dev/null && kill -0 "$proxy_pid" 2>/dev/null || die "another server answered" "set ETCD_PORT, PEER_PORT and PROXY_PORT to free ports"

say "write a Secret through the proxy"
echo "\$ etcdctl --endpoints=127.0.0.1:$proxy_port put $key $secret"
through put "$key" "$secret"

say "what a client of the proxy reads"
echo "\$ etcdctl --endpoints=127.0.0.1:$proxy_port get $key"
through get "$key"

say "what etcd stores"
echo "\$ etcdctl --endpoints=127.0.0.1:$etcd_port get $key --print-value-only | od -A x -t x1z | head -n 12"
direct get "$key" --print-value-only | od -A x -t x1z | head -n 12

say "what etcd's files hold"
echo "\$ grep -rc $secret $dir/etcd"
if grep -r -c -a -F "$secret" "$dir/etcd" | tee "$dir/grep.out" | grep -q -v ':0$'; then
	cat "$dir/grep.out"
	die "the plaintext is in etcd's files" "this must never happen: please report it"
fi
cat "$dir/grep.out"
echo "(a count of 0 in each file: the plaintext is in none of them)"

say "serving until Ctrl-C; try in another terminal"
cat <<TRY
  $bin/etcdctl-3.7 --endpoints=127.0.0.1:$proxy_port put /registry/secrets/default/mine hunter2
  $bin/etcdctl-3.7 --endpoints=127.0.0.1:$proxy_port watch --prefix /registry/secrets/
  $bin/etcdctl-3.7 --endpoints=127.0.0.1:$etcd_port get --prefix /registry/secrets/
  $bin/etcd-kms-proxy kms check --config $dir/config.yaml
  curl 'http://127.0.0.1:$admin_port/readyz?verbose'
TRY
tty=
[ ! -t 0 ] || tty=yes
# wait returns when either one ends, or at a signal, whose trap then stops the rest.
while kill -0 "$etcd_pid" 2>/dev/null && kill -0 "$proxy_pid" 2>/dev/null; do
	sleep 1 &
	wait $! || :
	# If the terminal ran only make, only make gets the signal that it is closed, and waits for this.
	[ -z "$tty" ] || [ -t 0 ] || stop 0
done
die "a server has stopped" "read $dir/proxy.log and $dir/etcd.log"
