package compose

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/canary"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// fault is something that happens to a container, and its end.
type fault struct {
	name        string
	begin, heal func(s *stack, service, id string)
}

var faults = []fault{
	{
		"stopped",
		func(s *stack, service, id string) {
			s.t.Helper()
			s.docker("stop", "--time", "20", id)
			if code := s.docker("inspect", "-f", "{{.State.ExitCode}}", id); strings.HasPrefix(service, "proxy-") && code != "0" {
				s.t.Errorf("%s was stopped with clients at work, and its exit code is %s", service, code)
			}
		},
		func(s *stack, _, id string) { s.docker("start", id) },
	},
	{
		"killed",
		func(s *stack, _, id string) { s.docker("kill", id) },
		func(s *stack, _, id string) { s.docker("start", id) },
	},
	{
		"paused",
		func(s *stack, _, id string) { s.docker("pause", id) },
		func(s *stack, _, id string) { s.docker("unpause", id) },
	},
	{
		"cut off from etcd's network",
		func(s *stack, _, id string) { s.docker("network", "disconnect", s.network("etcd"), id) },
		func(s *stack, service, id string) {
			s.docker("network", "connect", "--alias", service, s.network("etcd"), id)
		},
	},
}

// TestFaults has clients write through both proxies while members and proxies are stopped, killed,
// paused and disconnected, one at a time. It checks that what clients saw is linearizable, that no
// acknowledged write and no event is lost, and that every value in every volume is ciphertext.
func TestFaults(t *testing.T) {
	s := newStack(t, composeV2(t))
	s.up()
	values := canary.New("values")
	config := s.clientTLS()
	h := &history{begun: time.Now()}
	proxies := []string{s.ports["PROXY_1_ADDRESS"], s.ports["PROXY_2_ADDRESS"]}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var clients []*client
	var work sync.WaitGroup
	for id := range 8 {
		c := &client{history: h, id: id, values: values, kv: pb.NewKVClient(harness.Dial(t, proxies[id%2], config))}
		clients = append(clients, c)
		work.Go(func() { c.work(ctx) })
	}
	both, err := clientv3.New(clientv3.Config{Endpoints: []string{"https://" + proxies[0], "https://" + proxies[1]}, TLS: config, DialTimeout: 20 * time.Second, DialKeepAliveTime: 2 * time.Second, DialKeepAliveTimeout: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = both.Close() })
	events := watch(ctx, both, &work)

	for _, service := range []string{"proxy-1", "etcd-1", "etcd-2", "proxy-2", "etcd-3"} {
		for n, f := range faults {
			if testing.Short() && service != "proxy-1" && service != "etcd-2" {
				continue
			}
			id := s.container(service)
			began := time.Now()
			f.begin(s, service, id)
			// While one proxy is down, only the other one serves.
			s.progress(clients, service, 20, service+" was "+f.name)
			f.heal(s, service, id)
			s.back(service, id)
			s.progress(clients, "", 20, service+" is back")
			t.Logf("%d: %s was %s, %v in all", n, service, f.name, time.Since(began).Round(time.Millisecond))
		}
	}
	for _, c := range clients {
		c.ending.Store(true)
	}
	harness.Eventually(t, within, "an event of each acknowledged write", func() error { return events.missing(clients) })
	cancel()
	work.Wait()
	h.check(t)
	s.healthy("etcd-1", "etcd-2", "etcd-3", "proxy-1", "proxy-2")
	for n, address := range proxies {
		kv := pb.NewKVClient(harness.Dial(t, address, config))
		found, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte("/once/"), RangeEnd: []byte("/once0")})
		if err != nil {
			t.Fatal(err)
		}
		got := make(map[string]string)
		for _, pair := range found.Kvs {
			got[string(pair.Key)] = string(pair.Value)
		}
		lost := 0
		for _, c := range clients {
			for key, value := range c.once {
				if got[key] != value {
					lost++
				}
			}
		}
		if lost > 0 || len(got) == 0 {
			t.Errorf("proxy %d: %d of %d acknowledged writes are lost", n+1, lost, len(got))
		}
		t.Logf("proxy %d: %d keys that were written once", n+1, len(got))
	}
	for _, command := range []string{"status", "verify"} {
		s.run("exec", "-T", "proxy-1", "etcd-kms-proxy", command)
	}
	s.searchVolumes(values)
}

// client writes and reads registers that it shares, and its own keys, which it writes once.
type client struct {
	*history
	id, n  int
	values *canary.Set
	kv     pb.KVClient
	acked  atomic.Int64
	failed atomic.Value      // text of the last error
	ending atomic.Bool       // no further writes
	once   map[string]string // acknowledged; guarded by history.mu
}

func (c *client) work(ctx context.Context) {
	c.once = make(map[string]string)
	last := make(map[string]string)
	for ctx.Err() == nil {
		if c.ending.Load() {
			return
		}
		c.n++
		value := c.values.Value(fmt.Sprintf("%d-%d", c.id, c.n))
		// Use a few registers at a time, and others later, so that each history stays short.
		key := fmt.Sprintf("/register/%d-%d", int(time.Since(c.begun)/(5*time.Second)), rand.IntN(3))
		var err error
		switch rand.IntN(4) {
		case 0:
			err = c.write(ctx, key, value)
		case 1:
			own := fmt.Sprintf("/once/%d-%d", c.id, c.n)
			asking, cancel := context.WithTimeout(ctx, 3*time.Second)
			if _, err = c.kv.Put(asking, &pb.PutRequest{Key: []byte(own), Value: []byte(value)}); err == nil {
				c.mu.Lock()
				c.once[own] = value
				c.mu.Unlock()
			}
			cancel()
		case 2:
			if last[key] != "" {
				err = c.swap(ctx, key, last[key], value)
				delete(last, key)
				break
			}
			fallthrough
		default:
			last[key], err = c.read(ctx, key)
		}
		if err == nil {
			c.acked.Add(1)
		} else {
			c.failed.Store(err.Error())
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(rand.IntN(20)) * time.Millisecond): // limits the rate
		}
	}
}

func (c *client) write(ctx context.Context, key, value string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	r := record{client: c.id, key: key, call: c.now(), in: write{value}, wrote: value}
	_, err := c.kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
	r.unknown = err != nil
	c.add(r)
	return err
}

func (c *client) read(ctx context.Context, key string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	r := record{client: c.id, key: key, call: c.now()}
	got, err := c.kv.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		return "", err
	}
	if len(got.Kvs) > 0 {
		r.saw = string(got.Kvs[0].Value)
	}
	r.in = read{r.saw}
	c.add(r)
	return r.saw, nil
}

// swap writes value if the key still has old, by a compare of the plaintext.
func (c *client) swap(ctx context.Context, key, old, value string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	r := record{client: c.id, key: key, call: c.now(), in: swap{old, value}, wrote: value}
	got, err := c.kv.Txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: []byte(key), Target: pb.Compare_VALUE, Result: pb.Compare_EQUAL, TargetUnion: &pb.Compare_Value{Value: []byte(old)}}},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}}},
		Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key)}}}},
	})
	r.unknown = err != nil
	if err == nil && !got.Succeeded {
		if kvs := got.Responses[0].GetResponseRange().GetKvs(); len(kvs) > 0 {
			r.saw = string(kvs[0].Value)
		}
		r.in, r.wrote = kept{old, r.saw}, ""
	} else if err == nil {
		r.saw = old
	}
	c.add(r)
	return err
}

// progress waits until each client has had n further responses, except for those of a proxy that
// does not serve.
func (s *stack) progress(clients []*client, down string, n int64, what string) {
	s.t.Helper()
	before := make([]int64, len(clients))
	for i, c := range clients {
		before[i] = c.acked.Load()
	}
	harness.Eventually(s.t, within, "clients to go on after "+what, func() error {
		for i, c := range clients {
			if down == fmt.Sprintf("proxy-%d", c.id%2+1) {
				continue
			}
			if got := c.acked.Load() - before[i]; got < n {
				return fmt.Errorf("client %d has %d of %d responses; its last error: %v", i, got, n, c.failed.Load())
			}
		}
		return nil
	})
}

// back waits until a service works again.
func (s *stack) back(service, id string) {
	s.t.Helper()
	check := []string{"exec", id, "/usr/local/bin/etcdctl", "endpoint", "health"}
	if strings.HasPrefix(service, "proxy-") {
		check = []string{"exec", id, "/usr/local/bin/etcd-kms-proxy", "healthcheck"}
	}
	harness.Eventually(s.t, within, service+" to be back", func() error {
		_, err := docker(s.t.Context(), check...)
		return err
	})
}

// seen is what a watch through both proxies received for keys that are written once.
type seen struct {
	mu     sync.Mutex
	values map[string]string
	wrong  []string
}

func watch(ctx context.Context, c *clientv3.Client, work *sync.WaitGroup) *seen {
	s := &seen{values: make(map[string]string)}
	work.Go(func() {
		revision := int64(1)
		for ctx.Err() == nil {
			for res := range c.Watch(clientv3.WithRequireLeader(ctx), "/once/", clientv3.WithPrefix(), clientv3.WithRev(revision)) {
				s.mu.Lock()
				for _, e := range res.Events {
					key := string(e.Kv.Key)
					if _, twice := s.values[key]; twice {
						s.wrong = append(s.wrong, "an event came twice: "+key)
					}
					s.values[key] = string(e.Kv.Value)
					revision = e.Kv.ModRevision + 1
				}
				s.mu.Unlock()
			}
			// The watch ended, without a leader or by a drain: continue at its revision.
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	return s
}

func (s *seen) missing(clients []*client) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.wrong) > 0 {
		return fmt.Errorf("%s: %w", s.wrong[0], harness.ErrStop)
	}
	missing := 0
	for _, c := range clients {
		c.mu.Lock()
		for key, value := range c.once {
			if s.values[key] != value {
				missing++
			}
		}
		c.mu.Unlock()
	}
	if missing > 0 {
		return fmt.Errorf("%d are missing", missing)
	}
	return nil
}

// searchVolumes searches every volume and every log of the stack for plaintext.
func (s *stack) searchVolumes(values *canary.Set) {
	s.t.Helper()
	dir := s.t.TempDir()
	for service, paths := range map[string][]string{
		"setup":   {"/setup"}, // the certificates, the key, and the data of all three members
		"proxy-1": {"/etc/etcd-kms-proxy", "/var/log/etcd-kms-proxy"},
		"proxy-2": {"/var/log/etcd-kms-proxy"},
	} {
		for n, path := range paths {
			s.docker("cp", s.container(service)+":"+path, filepath.Join(dir, fmt.Sprintf("%s-%d", service, n)))
		}
	}
	found, err := values.Files(dir)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range found {
		s.t.Errorf("plaintext in a volume: %v", f)
	}
	if databases, err := filepath.Glob(filepath.Join(dir, "setup-0", "etcd-*", "member-data", "member", "snap", "db")); err != nil || len(databases) != 3 {
		s.t.Error(errors.Join(err, fmt.Errorf("there are %d databases of etcd, want 3", len(databases))))
	}
	for _, f := range values.Search("the logs", []byte(s.run("logs"))) {
		s.t.Errorf("plaintext in a log: %v", f)
	}
}
