package server

import (
	"fmt"
	"log/slog"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// TestLabelled: a client that writes values that name many keys, or bytes that are no text, makes
// few lines of metrics, and no panic.
func TestLabelled(t *testing.T) {
	var keys []inventory.KeyCount
	for i := range 1000 {
		keys = append(keys, inventory.KeyCount{State: keyring.Foreign, Provider: "x", KeyID: fmt.Sprintf("%d\xff", i), Count: inventory.Count{Keys: 1, Bytes: 10}})
	}
	keys = append(keys, inventory.KeyCount{State: keyring.Foreign, Count: inventory.Count{Keys: 7, Bytes: 70}})
	keys = append(keys, inventory.KeyCount{State: keyring.Current, Provider: "main", KeyID: "1", Count: inventory.Count{Keys: 500, Bytes: 5}})
	got := labelledKeys(keys)
	if len(got) != labelKeys || got[0].KeyID != "1" || got[1].KeyID != "0?" {
		t.Fatalf("%d: %v", len(got), got)
	}
	var sum int64
	for _, k := range got {
		sum += k.Keys
	}
	if last := got[len(got)-1]; last.Provider != "other" || sum != 1507 {
		t.Errorf("%v, %d in all", last, sum)
	}
	s := newScanner(nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler), 0)
	for _, k := range got {
		s.byKey.WithLabelValues("/a/", string(k.State), k.Provider, k.KeyID).Set(float64(k.Keys))
	}
}
