#!/usr/bin/env bash
# Software: libfaketime 0.9.10 of Debian 12, with Go 1.26.
#
# Expected: a dynamically linked program that runs under libfaketime sees the time that was set.
# For a static one, the library cannot be loaded, and a message says so.
#
# Observed: no Go program sees it, and there is no message. Not even one that is linked with the C
# library and calls it: Go's own time comes from the kernel's vDSO, so that one process has two
# clocks:
#     date: 2020
#     Go, static: now
#     Go, with cgo: now, and its C library: 2020
#
# Why it matters: tests that move the clock of etcd, Kubernetes or any other Go program with
# libfaketime or the command faketime pass without having moved it. A test must check that the
# program's clock has moved, or change the clock where Go takes it from.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false" GOWORK=off

command -v cc >/dev/null || { echo "a C compiler is needed"; exit 1; }
chmod 755 . # for apt's own user
apt-get download -q libfaketime=0.9.10-2.1 >apt.log 2>&1 || { cat apt.log; exit 1; }
dpkg-deb -x libfaketime_*.deb .
library=$(echo "$tmp"/usr/lib/*/faketime/libfaketime.so.1)

go mod init example.com/finding 2>/dev/null
mkdir static dynamic
cat >static/main.go <<'GO'
package main

import (
	"fmt"
	"time"
)

func main() { fmt.Println(time.Now().UTC().Year()) }
GO
cat >dynamic/main.go <<'GO'
package main

// #include <time.h>
// static int year(void) { time_t now = time(NULL); return gmtime(&now)->tm_year + 1900; }
import "C"

import (
	"fmt"
	"time"
)

func main() { fmt.Println(time.Now().UTC().Year(), C.year()) }
GO
CGO_ENABLED=0 go build -o go-static ./static
CGO_ENABLED=1 go build -o go-cgo ./dynamic

under() { LD_PRELOAD="$library" FAKETIME="2020-06-01 00:00:00" "$@" 2>&1 | sed "s/$(date -u +%Y)/now/"; }
read -r of_go of_c < <(under ./go-cgo) || :
{
  echo "date: $(under date -u +%Y)"
  echo "Go, static: $(under ./go-static)"
  echo "Go, with cgo: $of_go, and its C library: $of_c"
} | tee out
cat >expected <<'TEXT'
date: 2020
Go, static: now
Go, with cgo: now, and its C library: 2020
TEXT
if cmp -s out expected; then
  echo "still so: libfaketime does not move the clock of a Go program, and says nothing"
  exit 0
fi
echo "changed: the clocks of the programs are other ones"
exit 1
