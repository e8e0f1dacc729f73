package clients

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/client/v3/leasing"
	"go.etcd.io/etcd/client/v3/mirror"
	"go.etcd.io/etcd/client/v3/namespace"
	"go.etcd.io/etcd/client/v3/ordering"
	"go.uber.org/zap"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestLibrary runs the packages of etcd's client library, with every key encrypted.
func TestLibrary(t *testing.T) {
	t.Parallel()
	p := newPair(t, "3.7")
	p.proxy.RecordTested("etcd's Go client")
	client := func(t *testing.T) *clientv3.Client {
		t.Helper()
		c, err := clientv3.New(clientv3.Config{Endpoints: []string{"http://" + p.proxy.Address}, Logger: zap.NewNop(), DialTimeout: within, DialOptions: harness.SearchErrors()})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	value := func(n int) string { return p.Sealed.Value(strconv.Itoa(n)) }
	get := func(t *testing.T, kv clientv3.KV, key string) string {
		t.Helper()
		r, err := kv.Get(t.Context(), key)
		if err != nil || len(r.Kvs) != 1 {
			t.Fatalf("get %s: %v, %v", key, r, err)
		}
		return string(r.Kvs[0].Value)
	}
	for name, work := range map[string]func(t *testing.T){
		"STM": func(t *testing.T) { // several clients move amounts between two accounts
			c := client(t)
			for _, a := range []string{"stm/a", "stm/b"} {
				if _, err := c.Put(t.Context(), a, "100"); err != nil {
					t.Fatal(err)
				}
			}
			var all sync.WaitGroup
			for i := range 8 {
				all.Go(func() {
					from, to := "stm/a", "stm/b"
					if i%2 == 1 {
						from, to = to, from
					}
					for range 10 {
						_, err := concurrency.NewSTM(c, func(s concurrency.STM) error {
							a, err := strconv.Atoi(s.Get(from))
							b, berr := strconv.Atoi(s.Get(to))
							s.Put(from, strconv.Itoa(a-1))
							s.Put(to, strconv.Itoa(b+1))
							return errors.Join(err, berr)
						})
						if err != nil {
							t.Error(err)
						}
					}
				})
			}
			all.Wait()
			if a, b := get(t, c, "stm/a"), get(t, c, "stm/b"); a != "100" || b != "100" {
				t.Errorf("%s and %s", a, b)
			}
		},
		"mutex": func(t *testing.T) {
			c := client(t)
			counter := 0
			var all sync.WaitGroup
			for range 5 {
				all.Go(func() {
					s, err := concurrency.NewSession(c, concurrency.WithTTL(30))
					if err != nil {
						t.Error(err)
						return
					}
					defer s.Close()
					m := concurrency.NewMutex(s, "mutex")
					for range 4 {
						if err := m.Lock(t.Context()); err != nil {
							t.Error(err)
							return
						}
						counter++
						if err := m.Unlock(t.Context()); err != nil {
							t.Error(err)
						}
					}
				})
			}
			all.Wait()
			if counter != 20 {
				t.Errorf("%d", counter)
			}
		},
		"election": func(t *testing.T) {
			c := client(t)
			s, err := concurrency.NewSession(c, concurrency.WithTTL(30))
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			e := concurrency.NewElection(s, "election")
			if err := e.Campaign(t.Context(), value(1)); err != nil {
				t.Fatal(err)
			}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			seen := e.Observe(ctx)
			if r := <-seen; string(r.Kvs[0].Value) != value(1) {
				t.Errorf("%s", r.Kvs[0].Value)
			}
			if err := e.Proclaim(t.Context(), value(2)); err != nil {
				t.Fatal(err)
			}
			if r := <-seen; string(r.Kvs[0].Value) != value(2) {
				t.Errorf("%s", r.Kvs[0].Value)
			}
			if err := e.Resign(t.Context()); err != nil {
				t.Error(err)
			}
		},
		"namespace": func(t *testing.T) {
			c := client(t)
			kv, w := namespace.NewKV(c.KV, "namespace/"), namespace.NewWatcher(c.Watcher, "namespace/")
			events := w.Watch(t.Context(), "key")
			if _, err := kv.Put(t.Context(), "key", value(3)); err != nil {
				t.Fatal(err)
			}
			if e := <-events; string(e.Events[0].Kv.Key) != "key" || string(e.Events[0].Kv.Value) != value(3) {
				t.Errorf("%v", e)
			}
			r, err := kv.Txn(t.Context()).If(clientv3.Compare(clientv3.Value("key"), "=", value(3))).Then(clientv3.OpPut("key", value(4))).Commit()
			if err != nil || !r.Succeeded || get(t, c, "namespace/key") != value(4) {
				t.Errorf("%v, %v", r, err)
			}
		},
		"leasing": func(t *testing.T) { // of two caches, one writes a key that the other has cached
			one, stopOne, err := leasing.NewKV(client(t), "leasing/")
			if err != nil {
				t.Fatal(err)
			}
			defer stopOne()
			two, stopTwo, err := leasing.NewKV(client(t), "leasing/")
			if err != nil {
				t.Fatal(err)
			}
			defer stopTwo()
			for n := range 5 {
				if _, err := one.Put(t.Context(), "leased", value(n)); err != nil {
					t.Fatal(err)
				}
				if got := get(t, two, "leased"); got != value(n) {
					t.Errorf("%s after %d", got, n)
				}
				one, two = two, one
			}
		},
		"ordering": func(t *testing.T) {
			c := client(t)
			kv := ordering.NewKV(c.KV, func(clientv3.Op, clientv3.OpResponse, int64) error { return errors.New("an answer from before") })
			for n := range 20 {
				if _, err := kv.Put(t.Context(), "ordered", value(n)); err != nil {
					t.Fatal(err)
				}
				if got := get(t, kv, "ordered"); got != value(n) {
					t.Errorf("%s after %d", got, n)
				}
			}
		},
		"mirror": func(t *testing.T) {
			c := client(t)
			want := map[string]string{}
			for n := range 20 {
				key := fmt.Sprintf("mirror/%02d", n)
				want[key] = value(n)
				if _, err := c.Put(t.Context(), key, value(n)); err != nil {
					t.Fatal(err)
				}
			}
			s := mirror.NewSyncer(c, "mirror/", 0)
			base, failed := s.SyncBase(t.Context())
			for page := range base {
				for _, kv := range page.Kvs {
					if want[string(kv.Key)] != string(kv.Value) {
						t.Errorf("%s: %s", kv.Key, kv.Value)
					}
					delete(want, string(kv.Key))
				}
			}
			if err := <-failed; err != nil || len(want) > 0 {
				t.Errorf("%v, %d are left", err, len(want))
			}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			updates := s.SyncUpdates(ctx)
			if _, err := c.Put(t.Context(), "mirror/00", value(99)); err != nil {
				t.Fatal(err)
			}
			if u := <-updates; string(u.Events[0].Kv.Value) != value(99) {
				t.Errorf("%v", u)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			work(t)
		})
	}
}
