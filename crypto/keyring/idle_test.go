package keyring_test

import (
	"bytes"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
)

// TestIdleCiphers: health checks drop the ciphers that no value has needed for a minute.
func TestIdleCiphers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := ringtest.NewRig(t, ringtest.NewKMS(t, "ack"), nil).Start(t)
		var stored [10][]byte
		for i := range stored {
			stored[i] = g.MustWrite(t, fmt.Sprint(i), "v")
		}
		read := func(n int) {
			for i := range n {
				if _, err := g.Sealer.TryOpen(nil, fmt.Append(nil, i), bytes.Clone(stored[i])); err != nil {
					t.Error(err)
				}
			}
		}
		for range 3 {
			read(len(stored))
		}
		if n := g.Ciphers(); n != len(stored) {
			t.Errorf("%d ciphers are cached, want %d", n, len(stored))
		}
		for range 6 {
			time.Sleep(20 * time.Second)
			read(2)
		}
		time.Sleep(20 * time.Second)
		if n := g.Ciphers(); n != 2 {
			t.Errorf("%d ciphers are cached, want the 2 in use", n)
		}
		time.Sleep(3 * time.Minute)
		if n := g.Ciphers(); n != 0 {
			t.Errorf("%d ciphers are cached after 3 minutes without a value", n)
		}
		read(len(stored))
	})
}
