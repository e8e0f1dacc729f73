// Package differential sends the same requests to a bare etcd and, through the proxy, to another
// etcd. It fails at the first difference that a client could notice: complete responses with their
// headers and revisions; codes, texts and details of errors; metadata; watch events. Raw reads and
// a search of etcd's files check that the right values are encrypted, and that no others are
// changed.
//
// DIFFERENTIAL_SEQUENCES is the number of random sequences per etcd version and set of rules, and
// DIFFERENTIAL_SEED the seed of the first one. A failure logs the settings that run only the
// failing sequence.
package differential

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// sealedLimit is etcd's request limit behind the proxy: the default, plus what encryption adds to
// the largest transaction.
const (
	requestLimit = 1536 << 10
	sealedLimit  = requestLimit + 256<<10
)

// bench is a bare etcd, and the proxy in front of another etcd of the same version.
type bench struct {
	env       *harness.Env
	bareEtcd  *harness.Etcd
	behind    *harness.Etcd
	proxy     *harness.Proxy
	bare, via *side
	raw       *side // the etcd behind the proxy, without the proxy
	rules     ruleSet
	version   string
	tested    map[string]bool // by method or gateway path: whether etcd has it
}

func newBench(t *testing.T, version string, rules ruleSet, flags ...string) *bench {
	t.Helper()
	env := harness.New(t)
	b := &bench{env: env, rules: rules, version: version}
	b.bareEtcd = env.StartEtcd(harness.EtcdConfig{Version: version, Name: "bare", Bare: true, Flags: flags})
	b.behind = env.StartEtcd(harness.EtcdConfig{Version: version, Name: "behind", MaxRequestBytes: sealedLimit, Flags: flags})
	cfg := harness.ProxyConfig{Coordination: harness.NoCoordination(), Etcd: harness.Upstream{Endpoints: []string{b.behind.URL}, MaxRequestBytes: requestLimit}, Rules: rules.rules}
	if len(rules.rules) > 0 {
		cfg.KMS = []harness.KMSConfig{env.LocalKey(provider, 1)}
	}
	address := ""
	if os.Getenv("DIFFERENTIAL_WITHOUT_PROXY") != "" {
		// Two bare etcds must agree: this checks the test itself.
		address = b.behind.Address
	} else {
		b.proxy = env.StartProxy("proxy", cfg)
		b.proxy.WaitReady(30 * time.Second)
		address = b.proxy.Address
	}
	b.bare = newSide(env, "bare etcd", harness.Dial(t, b.bareEtcd.Address, nil))
	b.via = newSide(env, "the proxy", harness.Dial(t, address, nil))
	b.raw = newSide(env, "etcd behind the proxy", harness.Dial(t, b.behind.Address, nil))
	return b
}

// tells records what was tested, for docs/design/compatibility.md.
func (b *bench) tells(t *testing.T) {
	b.tested = make(map[string]bool)
	harness.RecordTested(t, func() (cells []harness.Tested) {
		for row, present := range b.tested {
			cells = append(cells, harness.Tested{Row: row, Column: "etcd " + b.version, Absent: !present})
		}
		return cells
	})
}

func (b *bench) pair(t *testing.T) *pair { return &pair{t: t, bare: b.bare, proxy: b.via} }

func setting(t *testing.T, name string, fallback uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return fallback
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("read %s: %v", name, err)
	}
	return n
}

func TestRandomSequences(t *testing.T) {
	fallback := uint64(300)
	if testing.Short() {
		fallback = 120
	}
	sequences := setting(t, "DIFFERENTIAL_SEQUENCES", fallback)
	for _, version := range harness.Versions(t) {
		for _, rules := range ruleSets {
			t.Run(version+"/"+rules.name, func(t *testing.T) {
				t.Parallel()
				b := newBench(t, version, rules)
				seed := setting(t, "DIFFERENTIAL_SEED", rand.Uint64()>>1)
				t.Logf("%d sequences from seed %d on", sequences, seed)
				start, counts := time.Now(), map[string]int{}
				for i := range sequences {
					b.sequence(t, seed+i, counts)
				}
				t.Logf("%d sequences in %v; answers, errors (!) and watched events: %v", sequences, time.Since(start).Round(time.Second), counts)
				for _, kind := range []string{"PutRequest", "RangeRequest", "DeleteRangeRequest", "TxnRequest", "CompactionRequest", "LeaseGrantRequest", "events"} {
					if kind == "events" && version == "3.4" {
						continue
					}
					if counts[kind] < int(sequences)/10 {
						t.Errorf("only %d of %s: this proves little", counts[kind], kind)
					}
				}
				// etcd does so by chance, and a proxy that left them out would each time.
				if n := counts[noPrevious]; n > 1+int(sequences)/100 {
					t.Errorf("%d watches differ by previous values that one side has left out", n)
				}
				b.checkFiles(t, "/s/p/x")
			})
		}
	}
}

// noPrevious is the key of the number of watches that differ by previous values alone.
const noPrevious = "watches without previous values"

// sequence runs one random sequence on an empty store and adds its requests to counts.
func (b *bench) sequence(t *testing.T, seed uint64, counts map[string]int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	defer func() {
		if t.Failed() {
			t.Logf("to run this sequence alone: DIFFERENTIAL_SEED=%d DIFFERENTIAL_SEQUENCES=1 go test ./differential -run '^%s$'", seed,
				strings.ReplaceAll(t.Name(), "/", "$/^"))
		}
	}()
	g := &generator{Rand: rand.New(rand.NewPCG(seed, 0)), rules: b.rules, sealed: b.env.Sealed, clear: b.env.Clear}
	p := b.pair(t)
	p.counts = counts
	p.reset(ctx)

	var live *watchPair
	// Before 3.4.25, etcd responds to progress requests before it has sent all events, so nothing
	// shows when a watch is complete. TestEveryMethod has a watch that knows which events to wait
	// for.
	watches := b.version != "3.4"
	if watches && g.chance(30) {
		live = p.openWatch(ctx)
		defer live.close()
		for range 1 + g.IntN(2) {
			live.create(g.watch(p.revision))
		}
	}
	for range g.IntN(8) {
		p.do(ctx, g.put())
	}
	n := 8 + g.IntN(24)
	for range n {
		request := g.next(p.revision)
		if _, compaction := request.(*pb.CompactionRequest); compaction && live != nil {
			// Whether a watch still finds the previous value of a key depends on whether the watch
			// or the compaction is first.
			live.check(ctx)
		}
		p.do(ctx, request)
		if live != nil && g.chance(3) {
			live.check(ctx)
			if ids := live.bare.active(); len(ids) > 0 {
				live.stop(ids[g.IntN(len(ids))])
			}
		}
	}
	if live != nil {
		live.check(ctx)
	}
	// These watches start in the past. etcd looks for such watches only every 100 ms, so several
	// share a stream.
	if watches && g.chance(20) {
		past := p.openWatch(ctx)
		defer past.close()
		for range 4 {
			past.create(g.watch(p.revision))
		}
		past.check(ctx)
	}
	b.checkStored(ctx, p)
}

// reset deletes what the previous sequence has left.
func (p *pair) reset(ctx context.Context) {
	p.t.Helper()
	everything := []byte{0}
	leases := p.do(ctx, &pb.LeaseLeasesRequest{})
	for _, lease := range leases.message.(*pb.LeaseLeasesResponse).Leases {
		p.do(ctx, &pb.LeaseRevokeRequest{ID: lease.ID})
	}
	p.do(ctx, &pb.DeleteRangeRequest{Key: everything, RangeEnd: everything, PrevKv: true})
}

// checkStored compares what both etcds store, without the proxy: ciphertext for keys under a rule,
// the same bytes for all others.
func (b *bench) checkStored(ctx context.Context, p *pair) {
	p.t.Helper()
	all := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}
	bare, raw := b.bare.do(ctx, all), b.raw.do(ctx, all)
	if bare.err != nil || raw.err != nil {
		p.fail("read what is stored: %v, %v", bare.err, raw.err)
	}
	want, got := bare.message.(*pb.RangeResponse).Kvs, raw.message.(*pb.RangeResponse).Kvs
	if len(want) != len(got) {
		p.fail("%d keys are stored, want %d", len(got), len(want))
	}
	for i, kv := range got {
		ciphertext := bytes.HasPrefix(kv.Value, []byte("k8s:enc:kms:v2:"+provider+":\n"))
		switch {
		case string(kv.Key) != string(want[i].Key) || kv.ModRevision != want[i].ModRevision || kv.CreateRevision != want[i].CreateRevision ||
			kv.Version != want[i].Version || kv.Lease != want[i].Lease:
			p.fail("stored: %s, want all but the value of %s", text(kv), text(want[i]))
		case b.rules.sealed(string(kv.Key)) && os.Getenv("DIFFERENTIAL_WITHOUT_PROXY") == "":
			if !ciphertext || len(want[i].Value) > 0 && len(kv.Value) < len(want[i].Value)+60 {
				p.fail("stored for sealed key %q: %q, want ciphertext", kv.Key, kv.Value)
			}
		case !bytes.Equal(kv.Value, want[i].Value):
			p.fail("stored for key %q under no rule: %q, want %q", kv.Key, kv.Value, want[i].Value)
		}
	}
}

// checkFiles searches the files of the etcd behind the proxy. The harness repeats the search at the
// end. This one also checks that a search finds what is there: the given key, and a value that must
// not be encrypted.
func (b *bench) checkFiles(t *testing.T, key string) {
	t.Helper()
	if b.proxy == nil {
		return
	}
	found, err := b.env.Sealed.Files(b.behind.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		t.Errorf("etcd holds a sealed value: %v", f)
	}
	controls := []string{key}
	if b.rules.name != "all" {
		controls = append(controls, b.env.Clear.Marker())
	}
	for _, control := range controls {
		if !filesHold(t, b.behind.DataDir, control) {
			t.Errorf("the search of etcd's files does not find %q, which is there", control)
		}
	}
}

func filesHold(t *testing.T, dir, text string) bool {
	t.Helper()
	found := false
	err := filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || found {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
		found = bytes.Contains(data, []byte(text))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
