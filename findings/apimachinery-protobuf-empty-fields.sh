#!/usr/bin/env bash
# Software: k8s.io/apimachinery v0.37.2, the protobuf serializer of Kubernetes' storage.
#
# Expected: as usual in protobuf, fields that are empty are not encoded.
#
# Observed: every object that the serializer writes, so every protobuf value in etcd, ends with two
# empty fields of runtime.Unknown, contentEncoding (3) and contentType (4):
#     first bytes: 6b3873000a, last bytes: 1a002200
#     without the two fields, the object is read all the same
#
# Why it matters: a value that another protobuf encoder reads and writes again is four bytes
# shorter. It is another value for compares by value and for checksums of backups, although nothing
# changed. A test of an encrypting proxy against real Kubernetes values needs that serializer.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

go mod init example.com/finding 2>/dev/null
go get k8s.io/apimachinery@v0.37.2 2>go.log || { cat go.log; exit 1; }
cat >main.go <<'GO'
package main

import (
	"bytes"
	"fmt"
	"os"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
)

func main() {
	version := schema.GroupVersion{Version: "v1"}
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, version)
	scheme.AddKnownTypes(version, &metav1.Status{})
	serializer := protobuf.NewSerializer(scheme, scheme)

	var out bytes.Buffer
	status := &metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Message: "hello"}
	if err := serializer.Encode(status, &out); err != nil {
		panic(err)
	}
	b := out.Bytes()
	fmt.Printf("first bytes: %x, last bytes: %x\n", b[:5], b[len(b)-4:])
	shorter := b[:len(b)-4]
	object, _, err := serializer.Decode(shorter, nil, nil)
	if err != nil {
		fmt.Println("without the last four bytes:", err)
		os.Exit(0)
	}
	if object.(*metav1.Status).Message == "hello" && bytes.HasSuffix(b, []byte{0x1a, 0, 0x22, 0}) {
		fmt.Println("without the two fields, the object is read all the same")
		os.Exit(10)
	}
}
GO
go build -o encode .
status=0
./encode || status=$?
if ((status == 10)); then
  echo "still so: an encoded object ends with two empty fields"
  exit 0
fi
echo "changed: an encoded object does not end with two empty fields"
exit 1
