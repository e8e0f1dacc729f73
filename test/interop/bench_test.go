package interop

import (
	"context"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// batch is how many values each side does before the other has its turn, so that both meet the same state of the machine.
const batch = 64

// BenchmarkBeside times both sides in turns in one run: "ours-ns" and "kube-ns" are the fastest turn of each, per value, "ours/kube" is
// their ratio; ns/op is of no meaning. Values have distinct etcd keys, and come through the same layers as in the products: marker, object, seed
// cache, cipher.
//
//   - seal: a new value
//   - open: a value that this process neither wrote nor read before, as in a list after a restart, with its seed in the cache
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
		// Two values of each key are opened in turns: what a side keeps for a key is of the other value then, and of no use.
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
				own = append(own[:0], pick(i, turn)...) // it is opened where it stands
				_, err := we.Open(ctx, keys[i], own)
				return err
			}, func(i, turn int) error {
				_, _, err := they.transformer.TransformFromStorage(ctx, pick(i, turn), keyContext(keys[i]))
				return err
			}},
			{"reopen", func(i, _ int) error {
				own = append(own[:0], stored[i]...)
				_, err := we.Open(ctx, keys[i], own)
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
	run(ours) // the seeds are unwrapped here
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
