package interop

import (
	"context"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// batch is the number of values that each side processes before the other's turn, so that both run
// under the same load of the machine.
const batch = 64

// BenchmarkBeside runs both sides in turns: "ours-ns" and "kube-ns" are the fastest turn of each,
// per value, and "ours/kube" is their ratio; ns/op has no meaning. Values have distinct etcd keys,
// and pass through the same layers as in the products: marker, object, cache of DEK seeds, cipher.
//
//   - seal: a new value
//   - open: a value that this process neither wrote nor read before, as in a list after a restart,
//     with its DEK seed in the cache
//   - reopen: the same value again, for which kube-apiserver keeps the derived key
func BenchmarkBeside(b *testing.B) {
	p := startPlugin(b, "key-1/version-1")
	writer := newOurs(b, p, provider)
	for _, size := range []int{256, 1024, 10240} {
		plaintext := make([]byte, size)
		keys := make([][]byte, batch)
		stored, other := make([][]byte, batch), make([][]byte, batch)
		for i := range keys {
			keys[i] = fmt.Appendf(nil, "/registry/secrets/namespace-%d/secret-%d", i, i)
			stored[i], other[i] = writer.seal(b, keys[i], plaintext), writer.seal(b, keys[i], plaintext)
		}
		var own []byte
		we, they := newOurs(b, p, provider), newKube(b, p, provider, envelope.TypeSeed)
		ctx := context.Background()
		// Two values of each key are decrypted in turns, so that what a side keeps for a key
		// belongs to the other value, and does not help.
		pick := func(i, turn int) []byte {
			if turn%2 == 0 {
				return stored[i]
			}
			return other[i]
		}
		for _, c := range []struct {
			name       string
			ours, kube func(i, turn int) error
		}{
			{"seal", func(i, _ int) error {
				_, err := we.Seal(ctx, keys[i], plaintext)
				return err
			}, func(i, _ int) error {
				_, err := they.transformer.TransformToStorage(ctx, plaintext, keyContext(keys[i]))
				return err
			}},
			{"open", func(i, turn int) error {
				own = append(own[:0], pick(i, turn)...) // decrypted in place
				_, err := we.Open(ctx, nil, keys[i], own)
				return err
			}, func(i, turn int) error {
				_, _, err := they.transformer.TransformFromStorage(ctx, pick(i, turn), keyContext(keys[i]))
				return err
			}},
			{"reopen", func(i, _ int) error {
				own = append(own[:0], stored[i]...)
				_, err := we.Open(ctx, nil, keys[i], own)
				return err
			}, func(i, _ int) error {
				_, _, err := they.transformer.TransformFromStorage(ctx, stored[i], keyContext(keys[i]))
				return err
			}},
		} {
			b.Run(fmt.Sprintf("%s/%d", c.name, size), func(b *testing.B) { beside(b, c.ours, c.kube) })
		}
	}
}

func beside(b *testing.B, ours, kube func(i, turn int) error) {
	turn := 0
	run := func(do func(i, turn int) error) float64 {
		start := time.Now()
		for i := range batch {
			if err := do(i, turn); err != nil {
				b.Fatal(err)
			}
		}
		return float64(time.Since(start).Nanoseconds()) / batch
	}
	run(ours) // unwraps the DEK seeds
	run(kube)
	best := [2]float64{math.Inf(1), math.Inf(1)}
	for b.Loop() {
		turn++
		best[0], best[1] = min(best[0], run(ours)), min(best[1], run(kube))
	}
	b.ReportMetric(best[0], "ours-ns")
	b.ReportMetric(best[1], "kube-ns")
	b.ReportMetric(best[0]/best[1], "ours/kube")
	for i, do := range []func(int, int) error{ours, kube} {
		n := 0
		allocs := testing.AllocsPerRun(100, func() {
			n++
			if err := do(0, n); err != nil {
				b.Fatal(err)
			}
		})
		b.ReportMetric(allocs, []string{"ours-allocs", "kube-allocs"}[i])
	}
}

// keyContext is the value.Context of an etcd key.
type keyContext []byte

// AuthenticatedData implements value.Context.
func (k keyContext) AuthenticatedData() []byte { return k }
