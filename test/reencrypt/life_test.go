package reencrypt

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	typed "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const secretsPrefix = "/registry/secrets/"

// TestLife follows an encrypted cluster: three members, a proxy, a kube-apiserver with existing
// Secrets, and clients that increment numbers in some of them. Encryption is turned on, everything
// is re-encrypted, the key is rotated twice, and encryption is turned off again, while reencrypt,
// the proxy and a member are killed at random moments. No update may be lost or applied twice. A
// watch must receive each change once and in order, including those of reencrypt. LIFE_SECRETS and
// LIFE_ROUNDS make the test larger.
func TestLife(t *testing.T) {
	t.Parallel()
	n, rounds := number("LIFE_SECRETS", 300), number("LIFE_ROUNDS", 1)
	for round := range rounds {
		// Each ends its processes before the next begins.
		t.Run(fmt.Sprint(round+1), func(t *testing.T) { newLife(t, n).live() })
	}
}

func number(name string, otherwise int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return otherwise
}

type life struct {
	*site
	n       int
	cluster *harness.Cluster
	proxy   *harness.Proxy
	phases  int
	secrets typed.SecretInterface
	clients []*secretWriter
}

func newLife(t *testing.T, n int) *life {
	l := &life{site: &site{Env: harness.New(t), t: t}, n: n}
	l.cluster = l.StartCluster(3, harness.EtcdConfig{Bare: true})
	l.on(l.cluster.Members[0].Address, l.cluster.URLs()...)
	l.cfg.Listeners = []harness.Listener{{Address: harness.FreeAddress(t)}}
	l.cfg.Rules = []harness.Rule{{Prefix: secretsPrefix, WriteWith: "main", AllowPlaintextReads: new(true)}}
	l.phase("plaintext")
	api := l.StartAPIServer(harness.APIServerConfig{EtcdServers: l.proxy.URL()})
	l.secrets = api.Client.CoreV1().Secrets("default")
	var all sync.WaitGroup
	for c := range 8 {
		all.Go(func() {
			for i := c; i < n; i += 8 {
				secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("s%05d", i)}, Data: map[string][]byte{"value": bytes.Repeat([]byte{'v'}, rand.IntN(4000))}}
				if i%5000 == 0 {
					secret.Data["value"] = bytes.Repeat([]byte{'v'}, 900<<10)
				}
				if _, err := l.secrets.Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	return l
}

// phase restarts the proxy with a rule that writes with a provider.
func (l *life) phase(writeWith string) {
	l.t.Helper()
	if l.proxy != nil {
		l.proxy.Stop(within)
	}
	l.cfg.Rules[0].WriteWith, l.cfg.Rules[0].ReadWith = writeWith, nil
	if writeWith == "plaintext" {
		l.cfg.Rules[0].ReadWith = []string{"main"}
	}
	l.phases++
	l.proxy = l.NewProxy(fmt.Sprintf("proxy-%d", l.phases), l.cfg)
	l.proxy.Args = []string{"--allow-weakening"}
	l.proxy.Start()
	l.proxy.WaitReady(within)
}

func (l *life) live() {
	t := l.t
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	counters := min(200, max(20, l.n/100))
	for i := range counters {
		l.clients = append(l.clients, &secretWriter{t: t, secrets: l.secrets, name: fmt.Sprintf("s%05d", i)})
	}
	w := l.observe(ctx)
	var all sync.WaitGroup
	for _, c := range l.clients {
		all.Go(func() { c.work(ctx) })
	}
	l.phase("main")
	l.renew()
	l.check("on", []byte(marker))
	for range 2 {
		l.kms.Rotate()
		l.renew()
	}
	l.phase("plaintext")
	l.renew()
	l.check("off", []byte("k8s\x00"))
	stop()
	all.Wait()
	updates := int64(0)
	for _, c := range l.clients {
		c.settle()
		updates += c.done.Load()
	}
	harness.Eventually(t, within, "the watch to see every update", func() error {
		for _, c := range l.clients {
			if seen := w.seen(c.name); seen != c.done.Load() {
				return fmt.Errorf("%s: %d of %d", c.name, seen, c.done.Load())
			}
		}
		return nil
	})
	end := l.versions(0)
	harness.Eventually(t, within, "the watch to see every change of every Secret, each rewriting too", func() error {
		for key, version := range end {
			if seen, want := w.changes(key), version-w.began[key]; seen != want {
				return fmt.Errorf("%s: %d of %d", key, seen, want)
			}
		}
		return nil
	})
	w.stop()
	t.Logf("%d updates by clients, %d conflicts", updates, l.conflicts())
	if updates < int64(counters) {
		t.Errorf("only %d updates: the clients were held up", updates)
	}
	list, err := l.secrets.List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != l.n {
		t.Errorf("%d Secrets of %d at the end: %v", len(list.Items), l.n, err)
	}
}

func (l *life) conflicts() (n int64) {
	for _, c := range l.clients {
		n += c.conflicts.Load()
	}
	return n
}

// renew re-encrypts, while reencrypt, the proxy and a member are killed, each at a random moment.
func (l *life) renew() {
	l.t.Helper()
	config := l.proxy.ConfigFile
	kills := []string{"reencrypt", "proxy", "member"}
	rand.Shuffle(len(kills), func(i, j int) { kills[i], kills[j] = kills[j], kills[i] })
	start := func(rate int) *harness.Process {
		return l.Spawn("reencrypt", "reencrypt", "--config", config, "--ignore-proxies", "--rate", fmt.Sprint(rate))
	}
	// Slow enough for a kill in the middle.
	p := start(max(50, l.n/6))
	for _, kill := range kills {
		// a random moment is the point
		time.Sleep(time.Duration(rand.IntN(1500)) * time.Millisecond)
		switch kill {
		case "reencrypt":
			p.Kill()
			p = start(max(50, l.n/6))
		case "proxy":
			l.proxy.Kill()
			l.proxy.Start()
		case "member":
			// the first is the test's own connection, which waits for it
			m := l.cluster.Members[rand.IntN(3)]
			m.Kill()
			time.Sleep(time.Duration(rand.IntN(1000)) * time.Millisecond)
			m.Start()
		}
	}
	if code := p.Wait(5 * time.Minute); code != 0 {
		l.t.Fatalf("reencrypt: exit code %d: %s", code, p.Log())
	}
}

// check checks how all Secrets are stored.
func (l *life) check(when string, begin []byte) {
	l.t.Helper()
	r, err := l.kv.Range(l.t.Context(), &pb.RangeRequest{Key: []byte(secretsPrefix), RangeEnd: []byte("/registry/secrets0")})
	if err != nil {
		l.t.Fatal(err)
	}
	if len(r.Kvs) != l.n {
		l.t.Errorf("%s: %d Secrets, want %d", when, len(r.Kvs), l.n)
	}
	for _, kv := range r.Kvs {
		if !bytes.HasPrefix(kv.Value, begin) {
			l.t.Errorf("%s: %s does not begin with %q", when, kv.Key, begin)
		}
	}
}

// versions returns how often each Secret was written up to a revision; 0 is the current one.
func (l *life) versions(revision int64) map[string]int64 {
	l.t.Helper()
	r, err := l.kv.Range(l.t.Context(), &pb.RangeRequest{Key: []byte(secretsPrefix), RangeEnd: []byte("/registry/secrets0"), Revision: revision})
	if err != nil {
		l.t.Fatal(err)
	}
	versions := make(map[string]int64)
	for _, kv := range r.Kvs {
		versions[strings.TrimPrefix(string(kv.Key), secretsPrefix+"default/")] = kv.Version
	}
	return versions
}

// observed is what a watch received: the last number of each Secret, and how many changes.
type observed struct {
	mu    sync.Mutex
	last  map[string]int64
	times map[string]int64
	began map[string]int64 // the versions at its start
	stop  func()
}

func (o *observed) changes(name string) int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.times[name]
}

func (o *observed) seen(name string) int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.last[name]
}

// observe watches the Secrets, and resumes like informers.
func (l *life) observe(ctx context.Context) *observed {
	l.t.Helper()
	list, err := l.secrets.List(ctx, metav1.ListOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
	from, err := strconv.ParseInt(list.ResourceVersion, 10, 64)
	if err != nil {
		l.t.Fatal(err)
	}
	o := &observed{last: make(map[string]int64), times: make(map[string]int64), began: l.versions(from)}
	watching, end := context.WithCancel(l.t.Context())
	ended := make(chan struct{})
	o.stop = func() {
		end()
		<-ended
	}
	go func() {
		defer close(ended)
		versions, at := make(map[string]uint64), list.ResourceVersion
		for watching.Err() == nil {
			w, err := l.secrets.Watch(watching, metav1.ListOptions{ResourceVersion: at})
			if err != nil {
				time.Sleep(50 * time.Millisecond) // the proxy or a member is being killed
				continue
			}
			for e := range w.ResultChan() {
				s, ok := e.Object.(*corev1.Secret)
				if !ok || e.Type != watch.Modified {
					// The watch may break off, but it must be possible to resume it.
					if err := apierrors.FromObject(e.Object); e.Type != watch.Error || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
						l.t.Errorf("the watch got %v: %v", e.Type, e.Object)
					}
					break
				}
				at = s.ResourceVersion
				o.saw(l.t, versions, s)
			}
			w.Stop()
		}
	}()
	return o
}

// saw checks one change.
func (o *observed) saw(t testing.TB, versions map[string]uint64, s *corev1.Secret) {
	version, _ := strconv.ParseUint(s.ResourceVersion, 10, 64)
	if version <= versions[s.Name] {
		t.Errorf("%s: version %d after %d", s.Name, version, versions[s.Name])
	}
	versions[s.Name] = version
	n := countIn(s)
	o.mu.Lock()
	defer o.mu.Unlock()
	if n != o.last[s.Name] && n != o.last[s.Name]+1 {
		t.Errorf("%s: the watch saw %d after %d", s.Name, n, o.last[s.Name])
	}
	o.last[s.Name] = n
	o.times[s.Name]++
}
