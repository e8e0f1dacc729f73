// Package benchkubernetes compares three ways to run kube-apiserver, side by side in one run:
// without encryption, with its own KMS v2 provider, and through the proxy with the same plugin.
//
//	make bench-kubernetes
//
// Each way has an etcd of its own. Every operation is measured in rounds, the three take turns
// within a round, and the medians of the rounds are printed, with the ratios to the API server's
// own KMS v2.
package benchkubernetes

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	provider  = "bench"
	namespace = "default"
	workers   = 8
	valueSize = 1024
)

const encryptionConfig = `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - kms: {apiVersion: v2, name: %s, endpoint: %q, timeout: 3s}
  - identity: {}
`

// way is one way to run an API server.
type way struct {
	name   string
	client *kubernetes.Clientset
	pids   map[string]int // by the name of the process
	made   atomic.Int64   // Secrets so far
}

// figures are those of one operation of one way in one round.
type figures struct {
	PerSecond float64
	P50, P99  time.Duration
	CPU       map[string]float64 // µs for each operation, by process
}

// setting reads a number from the environment.
func setting(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q: want a positive number", name, text)
	}
	return n
}

// TestBench measures. With -short it is a check that the measuring works, with few Secrets.
func TestBench(t *testing.T) {
	secrets, rounds, span := setting(t, "BENCH_SECRETS", 5000), setting(t, "BENCH_ROUNDS", 5), 3*time.Second
	if os.Getenv("BENCH_KUBERNETES") == "" {
		secrets, rounds, span = 50, 1, 200*time.Millisecond
	}
	env := harness.New(t)
	kms := env.LocalKey("local", 1)
	plugin := env.StartPlugin("plugin", "local", kms)

	var ways []*way
	for _, name := range []string{"plain", "kms-v2", "proxy"} {
		etcd := env.StartEtcd(harness.EtcdConfig{Name: "etcd-" + name})
		w := &way{name: name, pids: map[string]int{"etcd": etcd.PID()}}
		cfg := harness.APIServerConfig{Name: "apiserver-" + name, EtcdServers: etcd.URL}
		switch name {
		case "kms-v2":
			cfg.EncryptionConfig = env.File("encryption.yaml", fmt.Appendf(nil, encryptionConfig, provider, plugin.Socket))
			w.pids["plugin"] = plugin.PID()
		case "proxy":
			proxy := env.StartProxy("proxy", harness.ProxyConfig{
				Etcd:  harness.Upstream{Endpoints: []string{etcd.URL}},
				KMS:   []harness.KMSConfig{{Name: provider, Plugin: &harness.PluginKMS{Endpoint: plugin.Socket}}},
				Rules: []harness.Rule{{Prefix: "/registry/secrets/", WriteWith: provider}},
			})
			cfg.EtcdServers = proxy.URL()
			w.pids["proxy"], w.pids["plugin"] = proxy.PID(), plugin.PID()
		}
		api := env.StartAPIServer(cfg)
		w.client, w.pids["apiserver"] = api.Client, api.PID()
		harness.Eventually(t, time.Minute, "the namespace", func() error {
			_, err := w.client.CoreV1().Namespaces().Get(t.Context(), namespace, metav1.GetOptions{})
			return err
		})
		ways = append(ways, w)
	}

	operations := []operation{
		{"create", (*way).create}, {"get", (*way).get}, {"update", (*way).update},
		{"list", (*way).list}, {"list, pages of 500", (*way).pages},
	}
	results := map[string]map[string][]figures{} // by operation and way
	for _, w := range ways {
		w.fill(t, secrets)
	}
	for round := range rounds {
		for _, op := range operations {
			for i := range ways {
				w := ways[(i+round)%len(ways)] // the one that goes first changes with the round
				if results[op.name] == nil {
					results[op.name] = map[string][]figures{}
				}
				results[op.name][w.name] = append(results[op.name][w.name], w.measure(t, op, span))
			}
		}
	}
	report(t, ways, operations, results)
}

type operation struct {
	name string
	do   func(w *way, ctx context.Context, worker, turn int) error
}

// measure has all workers do one operation after the other for a while.
func (w *way) measure(t *testing.T, op operation, span time.Duration) figures {
	t.Helper()
	before := w.cpu(t)
	var mu sync.Mutex
	var all []time.Duration
	var failed error
	var wg sync.WaitGroup
	begin := time.Now()
	for worker := range workers {
		wg.Go(func() {
			var own []time.Duration
			var err error
			for turn := 0; err == nil && (turn == 0 || time.Since(begin) < span); turn++ {
				start := time.Now()
				err = op.do(w, t.Context(), worker, turn)
				own = append(own, time.Since(start))
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, own...)
			if err != nil {
				failed = err
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(begin)
	if failed != nil {
		t.Fatalf("%s on %s: %v", op.name, w.name, failed)
	}
	f := figures{PerSecond: float64(len(all)) / elapsed.Seconds(), CPU: map[string]float64{}}
	for name, spent := range w.cpu(t) {
		f.CPU[name] = float64((spent - before[name]).Microseconds()) / float64(len(all))
	}
	slices.Sort(all)
	f.P50, f.P99 = all[len(all)/2], all[len(all)*99/100]
	return f
}

// cpu is the CPU time of each process so far.
func (w *way) cpu(t *testing.T) map[string]time.Duration {
	t.Helper()
	times := map[string]time.Duration{}
	for name, pid := range w.pids {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		if err != nil || len(tasks) == 0 {
			t.Fatalf("read the CPU time of %s: no threads (%v)", name, err)
		}
		for _, task := range tasks {
			b, err := os.ReadFile(task)
			if err != nil {
				continue // a thread that has just ended
			}
			onCPU, _, _ := strings.Cut(string(b), " ")
			n, err := strconv.ParseInt(onCPU, 10, 64)
			if err != nil {
				t.Fatalf("read the CPU time of %s: %v", name, err)
			}
			times[name] += time.Duration(n)
		}
	}
	return times
}

func secret(name string, version int) *corev1.Secret {
	value := []byte(strings.Repeat(fmt.Sprintf("%s %d|", name, version), valueSize/8))[:valueSize]
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string][]byte{"value": value}}
}

// fill creates the Secrets that the other operations use.
func (w *way) fill(t *testing.T, n int) {
	t.Helper()
	var wg sync.WaitGroup
	var failed atomic.Pointer[error]
	for range workers {
		wg.Go(func() {
			for failed.Load() == nil && int(w.made.Load()) < n {
				if err := w.create(t.Context(), 0, 0); err != nil {
					failed.Store(&err)
				}
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		t.Fatalf("create Secrets on %s: %v", w.name, *err)
	}
}

func name(i int64) string { return fmt.Sprintf("secret-%07d", i) }

func (w *way) create(ctx context.Context, _, _ int) error {
	_, err := w.client.CoreV1().Secrets(namespace).Create(ctx, secret(name(w.made.Add(1)-1), 0), metav1.CreateOptions{})
	return err
}

// pick spreads the workers over the Secrets. No two of them use one.
func (w *way) pick(worker, turn int) string {
	share := w.made.Load() / workers
	return name(int64(worker)*share + int64(turn*31)%share)
}

func (w *way) get(ctx context.Context, worker, turn int) error {
	s, err := w.client.CoreV1().Secrets(namespace).Get(ctx, w.pick(worker, turn), metav1.GetOptions{})
	if err == nil && len(s.Data["value"]) != valueSize {
		err = fmt.Errorf("a value of %d bytes", len(s.Data["value"]))
	}
	return err
}

func (w *way) update(ctx context.Context, worker, turn int) error {
	_, err := w.client.CoreV1().Secrets(namespace).Update(ctx, secret(w.pick(worker, turn), turn+1), metav1.UpdateOptions{})
	return err
}

// list reads all Secrets as they are now, which the API server asks etcd for.
func (w *way) list(ctx context.Context, _, _ int) error {
	l, err := w.client.CoreV1().Secrets(namespace).List(ctx, metav1.ListOptions{})
	if err == nil && int64(len(l.Items)) < w.made.Load() {
		err = fmt.Errorf("%d Secrets of %d", len(l.Items), w.made.Load())
	}
	return err
}

func (w *way) pages(ctx context.Context, _, _ int) error {
	var count int64
	for next := ""; ; {
		l, err := w.client.CoreV1().Secrets(namespace).List(ctx, metav1.ListOptions{Limit: 500, Continue: next})
		if err != nil {
			return err
		}
		count += int64(len(l.Items))
		if next = l.Continue; next == "" {
			break
		}
	}
	if count < w.made.Load() {
		return fmt.Errorf("%d Secrets of %d", count, w.made.Load())
	}
	return nil
}

// line is a line of the report, for programs.
type line struct {
	Operation      string             `json:"operation"`
	Way            string             `json:"way"`
	PerSecond      float64            `json:"perSecond"`
	ToKMSV2        float64            `json:"throughputToKMSV2"` // median of the rounds' ratios
	P50            float64            `json:"p50Milliseconds"`
	P99            float64            `json:"p99Milliseconds"`
	CPU            map[string]float64 `json:"cpuMicroseconds"` // for each operation, by process
	CPUWithoutEtcd float64            `json:"cpuMicrosecondsWithoutEtcd"`
}

func report(t *testing.T, ways []*way, operations []operation, results map[string]map[string][]figures) {
	t.Helper()
	for _, op := range operations {
		for _, w := range ways {
			rounds, peer := results[op.name][w.name], results[op.name]["kms-v2"]
			of := func(f func(figures) float64) float64 {
				var all []float64
				for _, r := range rounds {
					all = append(all, f(r))
				}
				return median(all)
			}
			l := line{Operation: op.name, Way: w.name, CPU: map[string]float64{},
				PerSecond: of(func(f figures) float64 { return f.PerSecond }),
				P50:       of(func(f figures) float64 { return f.P50.Seconds() * 1e3 }),
				P99:       of(func(f figures) float64 { return f.P99.Seconds() * 1e3 })}
			var ratios []float64
			for i := range rounds {
				ratios = append(ratios, rounds[i].PerSecond/peer[i].PerSecond)
			}
			l.ToKMSV2 = median(ratios)
			for process := range w.pids {
				l.CPU[process] = of(func(f figures) float64 { return f.CPU[process] })
				if process != "etcd" {
					l.CPUWithoutEtcd += l.CPU[process]
				}
			}
			if l.PerSecond <= 0 || l.P99 < l.P50 || l.CPU["apiserver"] <= 0 {
				t.Errorf("%+v: not a measurement", l)
			}
			text, err := json.Marshal(l)
			if err != nil {
				t.Fatal(err)
			}
			fmt.Println(string(text))
		}
	}
}

func median(all []float64) float64 {
	slices.Sort(all)
	if n := len(all); n%2 == 0 {
		return (all[n/2-1] + all[n/2]) / 2
	}
	return all[len(all)/2]
}
