#!/usr/bin/env bash
# Software: k8s.io/apiserver v0.37.2, KMS v2.
#
# Expected: annotation keys of a KMS plugin are domain names in the form of RFC 1123, as the KMS v2
# API says and as Kubernetes checks such names elsewhere: a dot at the end is refused.
#
# Observed: the check of KMS v2 accepts one dot at the end, and takes keys with and without it for
# different annotations:
#     a.example.com and a.example.com.: valid
#     a.example.com as a DNS subdomain: valid
#     a.example.com. as a DNS subdomain: invalid
#
# Why it matters: a proxy or a tool that reads values of Kubernetes and checks annotation keys with
# the usual rule for DNS names refuses values that Kubernetes itself decrypts. That is data loss to
# its users.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false -mod=mod" GOWORK=off CGO_ENABLED=0

go mod init example.com/finding 2>/dev/null
go get k8s.io/apiserver@v0.37.2 2>go.log || { cat go.log; exit 1; }
cat >main.go <<'GO'
package main

import (
	"fmt"

	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
	kmstypes "k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2/v2"
)

func main() {
	object := &kmstypes.EncryptedObject{
		EncryptedData:          []byte("data"),
		KeyID:                  "key",
		EncryptedDEKSource:     []byte("source"),
		EncryptedDEKSourceType: kmstypes.EncryptedDEKSourceType_HKDF_SHA256_XNONCE_AES_GCM_SEED,
		Annotations:            map[string][]byte{"a.example.com": []byte("1"), "a.example.com.": []byte("2")},
	}
	fmt.Println("a.example.com and a.example.com.:", say(kmsv2.ValidateEncryptedObject(object) == nil))
	for _, name := range []string{"a.example.com", "a.example.com."} {
		fmt.Println(name, "as a DNS subdomain:", say(len(validation.IsDNS1123Subdomain(name)) == 0))
	}
}

func say(valid bool) string {
	if valid {
		return "valid"
	}
	return "invalid"
}
GO
go mod tidy 2>go.log || { cat go.log; exit 1; }
go run . | tee out
cat >expected <<'TEXT'
a.example.com and a.example.com.: valid
a.example.com as a DNS subdomain: valid
a.example.com. as a DNS subdomain: invalid
TEXT
if cmp -s out expected; then
  echo "still so: KMS v2 accepts annotation keys with a dot at the end"
  exit 0
fi
echo "changed: KMS v2 checks annotation keys otherwise"
exit 1
