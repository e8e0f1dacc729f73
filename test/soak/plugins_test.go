package soak

import (
	"bytes"
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestPlugins runs the load behind each available public plugin, with its own behavior, while its
// vendor fails, its process restarts, its key is rotated, and a client repeatedly reads a value
// whose DEK seed the plugin refuses.
func TestPlugins(t *testing.T) {
	for _, p := range kmstest.Personalities() {
		if p.Unusable != "" {
			continue
		}
		t.Run(p.Name, func(t *testing.T) { soakPlugin(t, p, max(4*time.Second, length(t)/8)) })
	}
}

func soakPlugin(t *testing.T, p kmstest.Personality, total time.Duration) {
	env := harness.New(t)
	etcd := env.StartEtcd(harness.EtcdConfig{})
	persona := kmstest.NewPersona(p)
	plugin := kmstest.NewPlugin(t, "", persona)
	plugin.Start()
	proxy := env.StartProxy("proxy", harness.ProxyConfig{
		Etcd:  harness.Upstream{Endpoints: []string{etcd.URL}},
		KMS:   []harness.KMSConfig{{Name: provider, PollInterval: "1s", Plugin: &harness.PluginKMS{Endpoint: plugin.Endpoint, Timeout: "2s"}}},
		Rules: []harness.Rule{{Prefix: sealed, WriteWith: provider, AllowPlaintextReads: new(bool)}},
		Cache: &harness.Cache{TTL: "3s", RevokeWithin: "2s"},
		Log:   harness.LogConfig{Level: "info"},
	})
	proxy.WaitReady(30 * time.Second)
	conn, raw := harness.Dial(t, proxy.Address, nil), harness.Dial(t, etcd.Address, nil)
	refused := refusedValue(t, pb.NewKVClient(conn), pb.NewKVClient(raw), env)

	ctx, stop := context.WithTimeout(t.Context(), total)
	defer stop()
	l := &load{env: env, conn: conn}
	var running sync.WaitGroup
	for w := range 4 {
		running.Go(func() { l.work(ctx, t, w) })
	}
	reads := 0
	running.Go(func() { reads = readRefused(ctx, t, l, proxy.Address, refused, p.Garbage) })
	running.Go(func() { troublePlugin(ctx, t, l, p, persona, plugin, total) })
	before := persona.Calls("Decrypt")
	running.Wait()
	decrypts := persona.Calls("Decrypt") - before

	l.checkAll(t)
	checkStored(t, raw)
	t.Logf("%d puts, %d gets; %d and %d refused in an outage; %d reads of the refused value; the plugin had %d Decrypt calls", l.puts.Load(), l.gets.Load(), l.putErrors.Load(), l.getErrors.Load(), reads, decrypts)
	if l.puts.Load() < 20 || l.gets.Load() < 20 || reads < 20 {
		t.Error("too little happened to say anything")
	}
	// DEK seeds are unwrapped again after 3 s, health checks run every second, and the longest
	// pause for the refused one is one second here.
	if most := 20 + int(total/time.Second)*5; decrypts > most {
		t.Errorf("%d Decrypt calls; want %d at most", decrypts, most)
	}
}

// refusedValue writes a value whose wrapped DEK seed is damaged to etcd directly, and returns its
// key.
func refusedValue(t *testing.T, kv, raw pb.KVClient, env *harness.Env) string {
	t.Helper()
	const key = sealed + "damaged"
	if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: []byte(env.Sealed.Value("damaged"))}); err != nil {
		t.Fatal(err)
	}
	res, err := raw.Range(t.Context(), &pb.RangeRequest{Key: []byte(key)})
	if err != nil || len(res.Kvs) != 1 {
		t.Fatal(res, err)
	}
	_, object, _ := envelope.Split(res.Kvs[0].Value)
	o, err := envelope.Parse(object)
	if err != nil {
		t.Fatal(err)
	}
	o.Source = bytes.Clone(o.Source)
	o.Source[len(o.Source)/2] ^= 1
	bad, err := o.Append([]byte("k8s:enc:kms:v2:" + provider + ":"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := raw.Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: bad}); err != nil {
		t.Fatal(err)
	}
	return key
}

// readRefused reads a refused value with etcd's own client, which retries after Unavailable, until
// ctx ends, and returns how often it did.
func readRefused(ctx context.Context, t *testing.T, l *load, address, key string, garbage bool) int {
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"http://" + address}, Logger: zap.NewNop()})
	if err != nil {
		t.Error(err)
		return 0
	}
	defer client.Close()
	want := codes.FailedPrecondition
	if garbage {
		want = codes.DataLoss
	}
	reads := 0
	for ; ctx.Err() == nil; reads++ {
		before := l.trouble.Load()
		own, cancel := limited()
		res, err := client.Get(own, key)
		cancel()
		switch code := status.Code(err); {
		case err == nil:
			t.Errorf("a refused value was read as %d bytes", len(res.Kvs[0].Value))
		case before || l.trouble.Load():
		case code != want || !strings.Contains(err.Error(), "etcd-kms-proxy: rule "):
			t.Errorf("a refused value: %v; want %v", err, want)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return reads
}

// troublePlugin makes the vendor fail for a while, restarts the plugin, and rotates the key.
func troublePlugin(ctx context.Context, t *testing.T, l *load, p kmstest.Personality, persona *kmstest.Persona, plugin *kmstest.Plugin, total time.Duration) {
	pause := func() {
		select {
		case <-time.After(total / 6):
		case <-ctx.Done():
		}
	}
	trouble := func(begin, end func()) {
		l.trouble.Store(true)
		begin()
		pause()
		end()
		kv, begun := pb.NewKVClient(l.conn), time.Now()
		for {
			own, cancel := limited()
			key, value := []byte(sealed+"well"), []byte(l.env.Sealed.Value("well"))
			_, err := kv.Put(own, &pb.PutRequest{Key: key, Value: value})
			if err == nil {
				_, err = kv.Range(own, &pb.RangeRequest{Key: key})
			}
			if err == nil {
				_, err = kv.Range(own, &pb.RangeRequest{Key: []byte(sealed + "ns-"), RangeEnd: []byte(sealed + "ns.")})
			}
			cancel()
			if err == nil {
				break
			}
			if time.Since(begun) > recovery {
				t.Errorf("%v after the plugin's trouble is over: %v", recovery, err)
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		l.trouble.Store(false)
	}
	pause()
	trouble(func() { persona.SetOutage(true) }, func() { persona.SetOutage(false) })
	pause()
	trouble(plugin.Stop, func() { persona.Restart(); plugin.Start() })
	if !p.OneVersion { // the operator needs another provider for that
		persona.Rotate()
	}
	pause()
}
