package inventory

import (
	"bytes"
	"testing"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
)

// TestRowsPerKey: keys whose names hold colons have a row each, under their whole names.
func TestRowsPerKey(t *testing.T) {
	names := []string{"aescbckey-2025-12-27T23:41:02+08:00", "aescbckey-2025-12-27T23:59:30+08:00", "aescbckey-2025-12-27T23"}
	for _, known := range [][]string{nil, names[:1], names} {
		tally := newTally(known)
		for i, name := range names {
			for range i + 1 {
				value := append([]byte("k8s:enc:aescbc:v1:"+name+":"), bytes.Repeat([]byte{':'}, 32)...)
				tally.add(&mvccpb.KeyValue{Value: value, ModRevision: 1}, keyring.Stale)
			}
		}
		count := tally.count(&Rule{})
		if len(count.Keys) != len(names) {
			t.Fatalf("rows %+v", count.Keys)
		}
		for i, name := range names {
			found := false
			for _, k := range count.Keys {
				found = found || k.Provider == "aescbc" && k.KeyID == name && k.Keys == int64(i+1)
			}
			if !found {
				t.Errorf("there is no row of %d keys for %q in %+v", i+1, name, count.Keys)
			}
		}
	}
}
