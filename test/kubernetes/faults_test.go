package kubernetes

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestFaults causes one fault after the other under a running API server. The parts depend on each
// other, so they run in order.
func TestFaults(t *testing.T) {
	t.Parallel()
	k := newStack(t, shape{transport: "tcp", plugin: true})
	for _, part := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"the KMS is down at the start", k.kmsDownAtStart},
		{"the KMS goes down", k.kmsGoesDown},
		{"a new key version", k.kmsRotates},
		{"the proxy crashes", func(t *testing.T) { k.proxyGoes(t, k.proxy.Kill) }},
		{"the proxy is stopped in order", func(t *testing.T) {
			k.proxyGoes(t, func() {
				if !k.proxy.Stop(20 * time.Second) {
					t.Error("the proxy did not end within 20 s of SIGTERM")
				}
			})
		}},
		{"a tampered Secret names itself", k.tampered},
	} {
		if !t.Run(part.name, part.run) {
			return
		}
	}
	k.checkStored(t)
}

// putConfigMap checks that keys without a rule are served.
func (k *stack) putConfigMap(t *testing.T, name string) {
	t.Helper()
	_, err := k.api.Client.CoreV1().ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		t.Errorf("a config map, under no rule, is not served: %v", err)
	}
}

// eventuallyCreates creates a Secret, however long the proxy needs to recover.
func (k *stack) eventuallyCreates(t *testing.T, name string) {
	t.Helper()
	harness.Eventually(t, 60*time.Second, "Secrets to be written", func() error {
		created, err := k.client("default").Create(t.Context(), k.secret(name, name), metav1.CreateOptions{})
		if err == nil {
			k.wants(t, created, nil, name)
		}
		return err
	})
}

// reports waits until the proxy reports a failed check whose text contains all words, and is ready
// otherwise.
func (k *stack) reports(t *testing.T, words ...string) {
	t.Helper()
	harness.Eventually(t, 60*time.Second, "the proxy to say what it cannot serve", func() error {
		report := k.proxy.Report()
		for line := range strings.Lines(report) {
			failed := strings.HasPrefix(line, "[-]")
			for _, word := range words {
				failed = failed && strings.Contains(line, word)
			}
			if failed && strings.HasPrefix(report, "200\n") {
				return nil
			}
		}
		return fmt.Errorf("/readyz answers %s; want 200 and a failed check with %q", report, words)
	})
}

func (k *stack) kmsDownAtStart(t *testing.T) {
	k.reports(t, "rule", secrets, provider)
	k.start() // ready without the KMS: no object that it needs is under a rule
	k.putConfigMap(t, "without-kms")
	_, err := k.client("default").Create(t.Context(), k.secret("too-early", "too-early"), metav1.CreateOptions{})
	if err == nil || !strings.Contains(err.Error(), "etcd-kms-proxy: ") {
		t.Errorf("create a Secret without a KMS: %v, want an error of the proxy's", err)
	}
	if _, found := k.stored(t)[secrets+"default/too-early"]; found {
		t.Error("a Secret was stored without a KMS")
	}
	k.kms.Start()
	k.eventuallyCreates(t, "early")
	k.proxy.WaitReady(60 * time.Second)
}

func (k *stack) kmsGoesDown(t *testing.T) {
	k.kms.Stop()
	k.reports(t, "kms", provider)
	// The DEK seed in use can be used for a day.
	got, err := k.client("default").Get(t.Context(), "early", metav1.GetOptions{})
	k.wants(t, got, err, "early")
	created, err := k.client("default").Create(t.Context(), k.secret("meanwhile", "meanwhile"), metav1.CreateOptions{})
	k.wants(t, created, err, "meanwhile")

	// A proxy that starts now has no DEK seed: it serves everything except the Secrets.
	k.proxy.Kill()
	k.proxy.Start()
	harness.Eventually(t, 60*time.Second, "config maps to be served", func() error {
		_, err := k.api.Client.CoreV1().ConfigMaps("default").Get(t.Context(), "without-kms", metav1.GetOptions{})
		return err
	})
	_, err = k.client("default").Get(t.Context(), "early", metav1.GetOptions{})
	if err == nil || !strings.Contains(err.Error(), "etcd-kms-proxy: ") {
		t.Errorf("get a Secret without a KMS: %v, want an error of the proxy's", err)
	}
	k.putConfigMap(t, "still-without-kms")

	k.kms.Start()
	for _, name := range []string{"early", "meanwhile"} {
		harness.Eventually(t, 60*time.Second, "Secrets to be read again", func() error {
			got, err := k.client("default").Get(t.Context(), name, metav1.GetOptions{})
			if err == nil {
				k.wants(t, got, nil, name)
			}
			return err
		})
	}
	k.proxy.WaitReady(60 * time.Second)
}

func (k *stack) kmsRotates(t *testing.T) {
	k.kms.Rotate()
	harness.Eventually(t, 60*time.Second, "a write under the new key version", func() error {
		name := fmt.Sprintf("rotated-%d", time.Now().UnixNano())
		if _, err := k.client("default").Create(t.Context(), k.secret(name, name), metav1.CreateOptions{}); err != nil {
			return err
		}
		if value := k.stored(t)[secrets+"default/"+name].value; !bytes.Contains(value, []byte(k.kms.KeyID())) {
			return fmt.Errorf("the stored value does not name %s", k.kms.KeyID())
		}
		return nil
	})
	got, err := k.client("default").Get(t.Context(), "early", metav1.GetOptions{})
	k.wants(t, got, err, "early")
}

// proxyGoes stops the proxy while clients write and watch, and starts it again. No acknowledged
// write may be lost, the API server must become ready again, and a watcher must not miss an event.
func (k *stack) proxyGoes(t *testing.T, end func()) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	namespace := k.namespace(t, fmt.Sprintf("writers-%d", time.Now().UnixNano()))
	var mu sync.Mutex
	acknowledged := map[string]string{} // name to value
	failures := 0
	written := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(acknowledged)
	}
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				name := fmt.Sprintf("w%d-%d", w, i)
				_, err := k.client(namespace).Create(ctx, k.secret(name, name), metav1.CreateOptions{})
				mu.Lock()
				if err == nil {
					acknowledged[name] = name
				} else {
					failures++
				}
				mu.Unlock()
				if err != nil {
					time.Sleep(20 * time.Millisecond) // while the proxy is down
				}
			}
		})
	}
	defer writers.Wait()
	defer stop()
	more := func(n int) {
		t.Helper()
		target := written() + n
		harness.Eventually(t, 60*time.Second, "writes to go on", func() error {
			if have := written(); have < target {
				return fmt.Errorf("%d of %d", have, target)
			}
			return nil
		})
	}
	more(50)
	end()
	harness.Eventually(t, 60*time.Second, "the API server to notice", func() error {
		if err := k.api.Alive(); err != nil {
			return err
		}
		if k.api.Ready() == nil {
			return fmt.Errorf("/readyz is still well")
		}
		return nil
	})
	k.proxy.Start()
	k.proxy.WaitReady(60 * time.Second)
	k.api.WaitReady(60 * time.Second)
	more(50)
	stop()
	writers.Wait()

	stored := k.stored(t)
	// Read twice: from etcd, and from the API server's cache, which is filled by a watch.
	for _, version := range []string{"", "0"} {
		harness.Eventually(t, 60*time.Second, "every acknowledged write", func() error {
			list, err := k.client(namespace).List(t.Context(), metav1.ListOptions{ResourceVersion: version})
			if err != nil {
				return err
			}
			seen := map[string]string{}
			for i := range list.Items {
				seen[list.Items[i].Name] = string(list.Items[i].Data["password"])
			}
			for name, value := range acknowledged {
				if seen[name] != k.env.Sealed.Value(value) {
					return fmt.Errorf("acknowledged Secret %s is %q", name, seen[name])
				}
				if stored[secrets+namespace+"/"+name] == nil {
					return fmt.Errorf("acknowledged Secret %s is not in etcd: %w", name, harness.ErrStop)
				}
			}
			return nil
		})
	}
	t.Logf("%d writes acknowledged, %d refused meanwhile", len(acknowledged), failures)
}

func (k *stack) tampered(t *testing.T) {
	ctx := t.Context()
	k.eventuallyCreates(t, "neighbour")
	k.eventuallyCreates(t, "victim")
	key := secrets + "default/victim"
	whole := k.stored(t)[key].value
	broken := bytes.Clone(whole)
	broken[len(broken)-1] ^= 1
	write := func(value []byte) {
		t.Helper()
		if _, err := k.raw.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: value}); err != nil {
			t.Fatal(err)
		}
	}
	write(broken)
	_, err := k.client("default").Get(ctx, "victim", metav1.GetOptions{})
	if err == nil || !strings.Contains(err.Error(), key) {
		t.Errorf("get the tampered Secret: %v, want an error that names %s", err, key)
	}
	neighbour, err := k.client("default").Get(ctx, "neighbour", metav1.GetOptions{})
	k.wants(t, neighbour, err, "neighbour")
	k.putConfigMap(t, "beside-the-tampered")
	// A list that bypasses the API server's cache contains it too.
	list, err := k.client("default").List(ctx, metav1.ListOptions{Limit: 500})
	if err == nil || !strings.Contains(err.Error(), key) {
		t.Errorf("list with a tampered Secret: %d Secrets and %v, want an error that names %s", len(list.Items), err, key)
	}

	write(whole)
	harness.Eventually(t, 60*time.Second, "the restored Secret to be listed", func() error {
		list, err := k.client("default").List(ctx, metav1.ListOptions{})
		if err == nil && len(list.Items) == 0 {
			err = fmt.Errorf("an empty list")
		}
		return err
	})
	victim, err := k.client("default").Get(ctx, "victim", metav1.GetOptions{})
	k.wants(t, victim, err, "victim")
}
