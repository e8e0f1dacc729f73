package keyring_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// TestRecoveryUnderStress: many readers and writers while keys are lost, disabled, rotated and come
// back, and the recovery is changed. Under the race detector; a value that opens is the right one,
// and while the key is disabled for long nothing opens.
func TestRecoveryUnderStress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, func(c *keyring.RingConfig, cc *keyring.CacheConfig) {
			c.RevokeWithin, cc.TTL = 2*time.Second, 10*time.Second
		}).Start(t)
		stored := s.Ack.MustWrite(t, "k", "v")
		ctx, cancel := context.WithCancel(context.Background())
		var all sync.WaitGroup
		opened := make([]int, 64)
		for i := range opened {
			all.Go(func() {
				for ctx.Err() == nil {
					if got, err := s.Ack.Read("k", stored); err == nil {
						opened[i]++
						if got != "v" {
							t.Errorf("opened as %q", got)
						}
					}
					if v, err := s.Ack.Write("k2", "w"); err == nil {
						if got, err := s.Ack.Read("k2", v); err == nil && got != "w" {
							t.Errorf("opened as %q", got)
						}
					}
					time.Sleep(time.Duration(100+rand.IntN(1000)) * time.Millisecond)
				}
			})
		}
		for i := range 40 {
			ack.Set(func() {
				ack.Down = []error{nil, ringtest.GoneError("Status"), ringtest.KMSError("Status", kmsclient.Unreachable), ringtest.KMSError("Status", kmsclient.KeyDisabled)}[rand.IntN(4)]
			})
			dr.Set(func() { dr.Down = []error{nil, nil, ringtest.KMSError("Status", kmsclient.Unreachable)}[rand.IntN(3)] })
			if i%7 == 0 {
				ack.Rotate(fmt.Sprint("key-r", i))
			}
			if i%5 == 0 {
				if err := s.Ack.SetRecovery([]*keyring.Ring{s.DR.Ring}[:i/5%2], i%2 == 0); err != nil {
					t.Error(err)
				}
			}
			time.Sleep(time.Duration(rand.IntN(6000)) * time.Millisecond)
		}
		ack.Set(func() { ack.Down = ringtest.KMSError("Status", kmsclient.KeyDisabled) })
		dr.Set(func() { dr.Down = nil })
		time.Sleep(15 * time.Second)
		if _, err := s.Ack.Read("k", stored); err == nil {
			t.Error("a disabled key opens values")
		}
		ack.Set(func() { ack.Down = ringtest.GoneError("Status") })
		time.Sleep(15 * time.Second)
		s.Ack.MustRead(t, "k", stored, "v")
		cancel()
		all.Wait()
		for i, n := range opened {
			if n == 0 {
				t.Errorf("reader %d never opened anything", i)
			}
		}
	})
}
