package encryption

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// benchRules returns rules with a local key, as the relay uses them.
func benchRules(b *testing.B) etcdwire.Rules {
	b.Helper()
	file := filepath.Join(b.TempDir(), "keys")
	if err := local.NewKeyFile(file); err != nil {
		b.Fatal(err)
	}
	k, err := New(Config{
		Config: &config.Config{
			KMS:   []config.KMS{{Name: "local", Local: &config.Local{KeyFile: file}, PollInterval: time.Minute, SeedMaxAge: time.Hour, SeedMaxSeals: 1 << 40}},
			Rules: []config.Rule{{Prefix: "/registry/", WriteWith: "local", ReadWith: []string{"local"}}},
		},
		Registry: prometheus.NewRegistry(), Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(k.Close)
	ctx, cancel := context.WithCancel(b.Context())
	ended := make(chan error)
	go func() { ended <- k.Run(ctx) }()
	b.Cleanup(func() { cancel(); <-ended })
	if err := k.Rings()[0].WaitForCheck(ctx); err != nil {
		b.Fatal(err)
	}
	set, err := etcdapi.NewRuleSet(k.Rules().ForProxy(), "/etcd-kms-proxy/")
	if err != nil {
		b.Fatal(err)
	}
	return etcdapi.NonBlocking.Rules(set)
}

func bytesField(b []byte, n protowire.Number, value []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), value)
}

func numberField(b []byte, n protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
}

// benchPairs returns n pairs as etcd returns them, with encrypted values of size bytes.
func benchPairs(b *testing.B, rules etcdwire.Rules, n, size int) [][]byte {
	b.Helper()
	pairs := make([][]byte, n)
	for i := range pairs {
		key := fmt.Appendf(nil, "/registry/secrets/default/secret-%05d", i)
		stored, err := rules.Seal([]byte{}, key, make([]byte, size))
		if err != nil {
			b.Fatal(err)
		}
		pair := numberField(numberField(numberField(bytesField(nil, 1, key), 2, 1_000_000), 3, 2_000_000), 4, 3)
		pairs[i] = bytesField(pair, 5, stored)
	}
	return pairs
}

// cpuTime is the CPU time of the process. Unlike the time of a benchmark, it says something on a
// machine that has other work.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func reportCPU(b *testing.B, before time.Duration) {
	b.Helper()
	b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N), "cpu-ns/op")
}

// BenchmarkValues measures what the values in messages cost, from the encoded message to the
// encoded message. "one value" reads one value repeatedly, "2,000 values" reads different ones, and
// "cold" does so with what other work leaves of the processor's caches.
func BenchmarkValues(b *testing.B) {
	rules := benchRules(b)
	header := bytesField(nil, 1, numberField(numberField(nil, 1, 1<<60), 3, 2_000_000))
	get := func(pairs [][]byte) (messages [][]byte) {
		for _, pair := range pairs {
			messages = append(messages, numberField(bytesField(header[:len(header):len(header)], 2, pair), 4, 1))
		}
		rand.Shuffle(len(messages), func(i, j int) { messages[i], messages[j] = messages[j], messages[i] })
		return messages
	}
	open := func(dst, msg []byte) ([]byte, error) {
		return etcdwire.RangeResponse(dst, msg, rules, etcdwire.RangeShape{})
	}
	run := func(b *testing.B, messages [][]byte, rewrite func(dst, msg []byte) ([]byte, error)) {
		b.Helper()
		longest := 0
		for _, m := range messages {
			longest = max(longest, len(m))
		}
		dst := make([]byte, 0, 2*longest)
		once := func(i int) {
			if _, err := rewrite(dst, messages[i%len(messages)]); err != nil {
				b.Fatal(err)
			}
		}
		for i := range 3 * len(messages) { // ciphers are cached then
			once(i)
		}
		b.ReportAllocs()
		before := cpuTime(b)
		for i := 0; b.Loop(); i++ {
			once(i)
		}
		reportCPU(b, before)
	}
	pairs := benchPairs(b, rules, 10_000, 256)
	messages := get(pairs[:2000])
	b.Run("get/one value", func(b *testing.B) { run(b, messages[:1], open) })
	b.Run("get/2,000 values", func(b *testing.B) { run(b, messages, open) })
	b.Run("get/cold", func(b *testing.B) {
		dst, other, took := make([]byte, 0, 2<<10), make([]byte, 4<<20), time.Duration(0)
		for i := range 3 * len(messages) {
			_, _ = open(dst, messages[i%len(messages)])
		}
		n := 0
		for b.Loop() {
			for i := 0; i < len(other); i += 64 {
				other[i]++
			}
			begun := time.Now()
			if _, err := open(dst, messages[n%len(messages)]); err != nil {
				b.Fatal(err)
			}
			took += time.Since(begun)
			n++
		}
		b.ReportMetric(float64(took)/float64(n), "cold-ns/op")
	})
	list := func(n, size int) []byte {
		list := bytes.Clone(header)
		for _, pair := range benchPairs(b, rules, n, size) {
			list = bytesField(list, 2, pair)
		}
		return list
	}
	for _, n := range []int{500, 10_000} {
		message := list(n, 1024)
		b.Run(fmt.Sprintf("list/%d", n), func(b *testing.B) {
			run(b, [][]byte{message}, open)
		})
	}
	var events [][]byte
	for _, pair := range pairs[:100] {
		events = append(events, bytesField(numberField(header[:len(header):len(header)], 2, 7), 11, bytesField(nil, 2, pair)))
	}
	b.Run("watch", func(b *testing.B) {
		run(b, events, func(dst, msg []byte) ([]byte, error) { return etcdwire.WatchResponse(dst, msg, rules) })
	})
	b.Run("put", func(b *testing.B) {
		put := bytesField(bytesField(nil, 1, []byte("/registry/secrets/default/secret-00001")), 2, make([]byte, 256))
		dst := make([]byte, 0, 1<<10)
		b.ReportAllocs()
		before := cpuTime(b)
		for b.Loop() {
			if _, err := etcdwire.PutRequest(dst, put, rules); err != nil {
				b.Fatal(err)
			}
		}
		reportCPU(b, before)
	})
	b.Run("txn", func(b *testing.B) {
		put := bytesField(bytesField(nil, 1, []byte("/registry/secrets/default/secret-00001")), 2, make([]byte, 1024))
		txn := bytesField(nil, 2, bytesField(nil, 2, put))
		dst := make([]byte, 0, 2<<10)
		b.ReportAllocs()
		before := cpuTime(b)
		for b.Loop() {
			if _, _, err := etcdwire.TxnRequest(dst, txn, rules); err != nil {
				b.Fatal(err)
			}
		}
		reportCPU(b, before)
	})
}
