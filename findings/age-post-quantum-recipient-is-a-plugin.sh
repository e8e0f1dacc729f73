#!/usr/bin/env bash
# Software: age 1.1.1 (as in Debian 12), 1.2.1 and 1.3.2.
#
# Expected: an age that does not know post-quantum recipients, which came with 1.3.0, says that the
# kind of the recipient is unknown, as it says of post-quantum identities.
#
# Observed: older versions take a recipient "age1pq1…" for one of a plugin called "pq" and try to
# start the program age-plugin-pq. 1.1.1 then reports a program in the current directory, although
# there is none, and 1.2.1 that the program was not found in PATH:
#     1.1.1: pq plugin: couldn't start plugin: age-plugin-pq resolves to executable in current directory (./age-plugin-pq)
#     1.2.1: pq plugin: couldn't start plugin: exec: "age-plugin-pq": executable file not found in $PATH
#     1.3.2: encrypted
#
# Why it matters: someone who has to decrypt an offline recovery copy on a machine with the
# distribution's age looks for a plugin that does not exist, where a newer age is what is missing.
set -euo pipefail

tmp=$(mktemp -d)
trap 'chmod -R u+w "$tmp"; rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false" GOWORK=off CGO_ENABLED=0

for version in 1.1.1 1.2.1 1.3.2; do
  echo "building age $version" >&2
  GOBIN="$tmp/$version" go install "filippo.io/age/cmd/age@v$version" 2>go.log || { cat go.log; exit 1; }
done
GOBIN="$tmp/1.3.2" go install filippo.io/age/cmd/age-keygen@v1.3.2 2>go.log || { cat go.log; exit 1; }

1.3.2/age-keygen -pq -o identity.txt 2>/dev/null
recipient=$(1.3.2/age-keygen -y identity.txt)
for version in 1.1.1 1.2.1 1.3.2; do
  if message=$(echo text | PATH=/usr/bin:/bin "$version/age" -r "$recipient" -o /dev/null 2>&1); then
    echo "$version: encrypted"
  else
    echo "$version: $(sed -n 's/.*failed to wrap key for recipient #0: //p' <<<"$message")"
  fi
done | tee out
cat >expected <<'TEXT'
1.1.1: pq plugin: couldn't start plugin: age-plugin-pq resolves to executable in current directory (./age-plugin-pq)
1.2.1: pq plugin: couldn't start plugin: exec: "age-plugin-pq": executable file not found in $PATH
1.3.2: encrypted
TEXT
if cmp -s out expected; then
  echo "still so: an age before 1.3 takes a post-quantum recipient for one of a plugin"
  exit 0
fi
echo "changed: the versions of age answer otherwise"
exit 1
