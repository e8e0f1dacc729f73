// Package harness starts the real processes that tests use: etcd, etcd-kms-proxy and
// kube-apiserver.
//
// Everything runs on 127.0.0.1 or on unix sockets in one temporary folder. The harness checks that
// the process that responds is the one that it started, keeps its output, and stops it at the end
// by its process ID, in the reverse order of starting. Then it searches every log, every metric and
// every file of etcd for the secrets that the test wrote. It searches errors that clients get at
// once. One finding fails the test.
package harness

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/canary"
)

// Env is the set of processes of one test, with the secrets that they handle. Its methods fail the
// test instead of returning errors. They must be called from the test's own goroutine unless they
// say otherwise.
type Env struct {
	TB testing.TB
	// Dir is the temporary folder, with a path short enough for unix sockets. HARNESS_KEEP=1 keeps
	// it.
	Dir string
	// Sealed are the values under a rule and all key material: never in a log, a metric or etcd's
	// files.
	Sealed *canary.Set
	// Clear are the values without a rule: never in a log or a metric, but unchanged in etcd.
	Clear *canary.Set
	// ProxyEnv are further environment variables of etcd-kms-proxy, as NAME=VALUE.
	ProxyEnv []string

	mu       sync.Mutex
	logs     []string
	dataDirs []string
}

// New returns an empty environment that stops its processes when the test ends.
func New(tb testing.TB) *Env {
	tb.Helper()
	dir, err := os.MkdirTemp("", "ekp")
	if err != nil {
		tb.Fatalf("make temporary folder: %v", err)
	}
	e := &Env{TB: tb, Dir: dir, Sealed: canary.New("sealed values"), Clear: canary.New("values under no rule")}
	e.enter()
	tb.Cleanup(e.finish)
	return e
}

// finish runs after every process has ended.
func (e *Env) finish() {
	e.leave()
	e.mu.Lock()
	logs, dataDirs := e.logs, e.dataDirs
	e.mu.Unlock()
	for _, set := range []*canary.Set{e.Sealed, e.Clear} {
		e.report(set, "a log or metric", logs...)
	}
	e.report(e.Sealed, "etcd's files", dataDirs...)
	if e.TB.Failed() {
		for _, path := range logs {
			e.TB.Logf("--- end of %s\n%s", filepath.Base(path), tail(path, 3<<10))
		}
	}
	if os.Getenv("HARNESS_KEEP") != "" {
		e.TB.Logf("kept %s", e.Dir)
		return
	}
	if err := os.RemoveAll(e.Dir); err != nil {
		e.TB.Errorf("remove temporary folder: %v", err)
	}
}

func (e *Env) report(set *canary.Set, where string, paths ...string) {
	found, err := set.Files(paths...)
	if err != nil {
		e.TB.Errorf("search for secrets: %v", err)
	}
	for _, f := range found {
		e.TB.Errorf("a secret stands in %s: %v", where, f)
	}
}

// File writes a file of mode 0600 in the temporary folder and returns its path.
func (e *Env) File(name string, data []byte) string {
	e.TB.Helper()
	path := filepath.Join(e.Dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		e.TB.Fatalf("write file: %v", err)
	}
	return path
}

func (e *Env) addLog(path string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, have := range e.logs {
		if have == path {
			return
		}
	}
	e.logs = append(e.logs, path)
}

func (e *Env) addDataDir(path string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.dataDirs = append(e.dataDirs, path)
}

// BinDir is the folder with what the Makefile builds and installs for the tests.
func BinDir(tb testing.TB) string {
	tb.Helper()
	dir := os.Getenv("ETCD_KMS_PROXY_BIN")
	if dir == "" {
		_, self, _, _ := runtime.Caller(0)
		dir = filepath.Join(filepath.Dir(self), "..", "..", ".bin")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		tb.Fatalf("find %s: %v", dir, err)
	}
	return dir
}

// Bin returns the path of a binary that the Makefile builds. It fails the test if the file is
// missing: a skipped end-to-end test proves nothing.
func Bin(tb testing.TB, name string) string {
	tb.Helper()
	path := filepath.Join(BinDir(tb), name)
	if _, err := os.Stat(path); err != nil {
		target := "tools"
		switch name {
		case "etcd-kms-proxy":
			target = "build"
		case "etcd-3.4":
			target = "tools-etcd-3.4"
		}
		tb.Fatalf("find %s: %v; run `make %s` first", name, err, target)
	}
	return path
}

// Eventually polls until try returns nil. An error that wraps [ErrStop] ends the wait at once.
func Eventually(tb testing.TB, within time.Duration, what string, try func() error) {
	tb.Helper()
	deadline := time.Now().Add(within)
	pause := 5 * time.Millisecond
	for {
		err := try()
		if err == nil {
			return
		}
		if errors.Is(err, ErrStop) || time.Now().After(deadline) {
			tb.Fatalf("wait for %s (up to %v): %v", what, within, err)
		}
		time.Sleep(pause)
		pause = min(pause*2, 100*time.Millisecond)
	}
}

// ErrStop in an error tells [Eventually] that waiting longer is useless.
var ErrStop = errors.New("no use waiting")

func tail(path string, limit int) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	if len(data) > limit {
		data = data[len(data)-limit:]
		if _, rest, ok := strings.Cut(string(data), "\n"); ok {
			return "…\n" + rest
		}
	}
	return string(data)
}
