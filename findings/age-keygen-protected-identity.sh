#!/usr/bin/env bash
# Software: age 1.1.1 (as in Debian 12) and 1.3.2.
#
# Expected: `age-keygen -y` prints the recipient of every identity file that `age -d -i` takes, and
# asks for the passphrase of a protected one, as `age -d -i` does.
#
# Observed: it takes the age file for a list of identities, and reports a malformed key, although
# the file is intact:
#     1.1.1: error at line 1: malformed secret key: separator '1' at invalid position: pos=20, len=21
#     1.3.2: error at line 1: unknown identity type
#     decrypted first, 1.1.1: the recipient
#     decrypted first, 1.3.2: the recipient
#
# Why it matters: the identity in a safe is protected by a passphrase. Someone who needs its
# recipient on the day of a recovery reads that the key is malformed, and may believe it is lost.
# `age -d identity.age | age-keygen -y` prints it.
set -euo pipefail

tmp=$(mktemp -d)
trap 'chmod -R u+w "$tmp"; rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
cd "$tmp"
export GOFLAGS="-buildvcs=false" GOWORK=off CGO_ENABLED=0

for version in 1.1.1 1.3.2; do
  echo "building age $version" >&2
  GOBIN="$tmp/$version" go install "filippo.io/age/cmd/age-keygen@v$version" 2>go.log || { cat go.log; exit 1; }
done
# age asks for passphrases on a terminal only; its plugin batchpass takes them from the environment.
GOBIN="$tmp/1.3.2" go install filippo.io/age/cmd/age@v1.3.2 filippo.io/age/cmd/age-plugin-batchpass@v1.3.2 2>go.log || { cat go.log; exit 1; }
export PATH="$tmp/1.3.2:$PATH" AGE_PASSPHRASE=passphrase AGE_PASSPHRASE_WORK_FACTOR=10

1.3.2/age-keygen -o identity.txt 2>/dev/null
recipient=$(1.3.2/age-keygen -y identity.txt)
age -e -j batchpass -o identity.age identity.txt
for version in 1.1.1 1.3.2; do
  if out=$("$version/age-keygen" -y identity.age 2>&1 </dev/null); then
    echo "$version: ${out/$recipient/the recipient}"
  else
    echo "$version: $(sed -n 's/^age-keygen: error: failed to parse input: //p' <<<"$out")"
  fi
done | tee out
for version in 1.1.1 1.3.2; do
  echo "decrypted first, $version: $(age -d -j batchpass identity.age | "$version/age-keygen" -y | sed "s/^$recipient\$/the recipient/")"
done | tee -a out
cat >expected <<'TEXT'
1.1.1: error at line 1: malformed secret key: separator '1' at invalid position: pos=20, len=21
1.3.2: error at line 1: unknown identity type
decrypted first, 1.1.1: the recipient
decrypted first, 1.3.2: the recipient
TEXT
if cmp -s out expected; then
  echo "still so: age-keygen -y takes a protected identity file for a malformed key"
  exit 0
fi
echo "changed: age-keygen answers otherwise"
exit 1
