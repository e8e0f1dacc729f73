#!/bin/sh
# build.sh DIR [NAME ...] builds the public KMS v2 plugins that the tests of this folder run, each at
# the commit of its page in docs/plugins, as DIR/kms-plugin-NAME. It needs git, Go and access to the
# repositories; those with cgo also need a C compiler.
set -eu
dir=$1
shift

# name, repository, commit, package, cgo
table='
age https://github.com/asgeirn/age-kms-plugin 71d1e12153573ca19e0e812a84716d5ea35b4716 . 0
mock https://github.com/kubernetes/kms 7dc88c042aa2916629d29cb4744e5e76ce418b77 ./internal/plugins/_mock 1
hsm https://github.com/synthe102/k8s-hsm-kmsv2 e671e14f3477a5e365095f607c41bcabf4b54832 ./cmd/kms-plugin 1
ovh https://github.com/ovh/okms-k8s-encryption-provider 2ee26b995aebcf43a1488255f3533e48adf0205e ./cmd/okms-k8s-encryption-provider 0
vault https://github.com/FalcoSuessgott/vault-kubernetes-kms c3bc385fd531b8b9a2ac924d8f57f3d7a5305f28 . 0
aws https://github.com/kubernetes-sigs/aws-encryption-provider 6d4f71e96480b186ff19ea3c1ba4f9d90c2b6b9e ./cmd/server 0
google https://github.com/GoogleCloudPlatform/k8s-cloudkms-plugin a88bafe6cfcc8727e6a7243dfa16f978b1c9a468 ./cmd/k8s-cloudkms-plugin 0
barbican https://github.com/kubernetes/cloud-provider-openstack c453fb7c9bbb2091aee763d9d2809cc81fdf31c6 ./cmd/barbican-kms-plugin 0
stackit https://github.com/hown3d/stackit-kubernetes-kms-provider 4b3ae08df02bfa320506424f47812f4557c8b3e1 . 0
'

mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export GOWORK=off
failed=
build() {
  git init -q "$tmp/$1/${2##*/}" && cd "$tmp/$1/${2##*/}" && git fetch -q --depth 1 "$2" "$3" && git checkout -q FETCH_HEAD || return
  case $4 in *_mock) cd "$4" && set -- "$1" "$2" "$3" . "$5" ;; esac # a module of its own
  CGO_ENABLED=$5 GOFLAGS="${GOFLAGS:-} -buildvcs=false -mod=mod" go build -trimpath -o "$dir/kms-plugin-$1" "$4"
}
while read -r name repo commit package cgo; do
  [ -n "$name" ] || continue
  case " ${*:-$name} " in *" $name "*) ;; *) continue ;; esac
  [ ! -x "$dir/kms-plugin-$name" ] || continue
  echo "building $name from $repo at $commit"
  (build "$name" "$repo" "$commit" "$package" "$cgo") || failed="$failed $name"
  rm -rf "${tmp:?}/$name"
done <<TABLE
$table
TABLE
[ -z "$failed" ] || { echo "not built:$failed" >&2; exit 1; }
