package scoreboard

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "go.etcd.io/etcd/tests/v3"

// edits put the proxy in front of each member. Each must match exactly once; otherwise etcd's
// framework has changed.
var edits = [][2]string{
	{"etcdserver.NewServer(m.ServerConfig)", "etcdserver.NewServer(withRoom(m.ServerConfig))"},
	{"v3rpc.Server(m.Server, tlscfg,", "v3rpc.Server(m.Server, behindFront(tlscfg),"},
	{"go m.GRPCServer.Serve(m.GRPCListener)", "go m.GRPCServer.Serve(m.front())"},
}

// packages contain the tests that use etcd as clients do.
var packages = []string{
	"integration", "integration/clientv3", "integration/clientv3/concurrency", "integration/clientv3/connectivity", "integration/clientv3/examples",
	"integration/clientv3/experimental/recipes", "integration/clientv3/lease", "integration/clientv3/naming", "integration/clientv3/snapshot", "integration/clientv3/watch",
}

// TestClients runs them.
func TestClients(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes a quarter of an hour: make scoreboard")
	}
	dir := t.TempDir()
	bare := os.Getenv("SCOREBOARD_BARE") != ""
	modfile := copyModule(t, dir, bare)
	known := readKnown(t)
	chosen := strings.Fields(os.Getenv("SCOREBOARD_PACKAGES"))
	whole := len(chosen) == 0 && os.Getenv("SCOREBOARD_RUN") == ""
	if len(chosen) == 0 {
		chosen = packages
	}
	args := []string{"test", "-json", "-modfile", modfile, "-count=1", "-p=1", "-timeout=50m"}
	if run := os.Getenv("SCOREBOARD_RUN"); run != "" {
		args = append(args, "-run", run)
	}
	for _, p := range chosen {
		args = append(args, module+"/"+p)
	}
	s := runTests(t, dir, args)
	var failed []string
	for _, name := range slices.Sorted(maps.Keys(s.result)) {
		if s.result[name] == "fail" {
			failed = append(failed, name)
		}
	}
	counts := s.counts()
	t.Logf("etcd's client tests: %d pass, %d fail, %d skipped, of %d", counts["pass"], counts["fail"], counts["skip"], len(s.result))
	for _, name := range failed {
		if why := known[name]; why != "" {
			t.Logf("%s fails, as is known: %s", name, why)
			continue
		}
		t.Errorf("%s\n%s", name, s.output[name])
	}
	for name := range known {
		if result := s.result[name]; whole && !bare && result != "fail" {
			t.Logf("%s: %s; testdata/known.txt says that it fails", name, result)
		}
	}
	if whole && len(s.result) < 400 {
		t.Errorf("only %d tests ran", len(s.result))
	}
}

// scores are the results of top-level tests by package and name.
type scores struct {
	result map[string]string
	output map[string]string
}

func (s *scores) counts() map[string]int {
	counts := make(map[string]int)
	for _, r := range s.result {
		counts[r]++
	}
	return counts
}

func runTests(t *testing.T, dir string, args []string) *scores {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", args...)
	// A test creates its sockets, whose paths must be short, in its folder. Files that it leaves
	// are removed with the copy.
	cmd.Env = append(os.Environ(), "GOFLAGS=", "TMPDIR="+dir, "SCOREBOARD_PROXY="+proxyBinary(t), "SCOREBOARD_KEY="+newKey(t, dir))
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s := &scores{result: make(map[string]string), output: make(map[string]string)}
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e struct{ Action, Package, Test, Output string }
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			continue
		}
		s.note(strings.TrimPrefix(e.Package, module+"/"), e.Test, e.Action, e.Output)
	}
	err = cmd.Wait()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited || len(s.result) == 0 {
		t.Fatalf("go %q: %v\n%s\n%v", args, err, errs.Bytes(), s)
	}
	return s
}

const keep = 8 << 10 // the last lines of a test's output

// note counts a top-level test by its own result. A package that fails without a failed test, for
// example because it does not build, counts as one.
func (s *scores) note(pkg, test, action, output string) {
	top, _, sub := strings.Cut(test, "/")
	name := pkg + "." + top
	switch action {
	case "output":
		o := s.output[name] + output
		s.output[name] = o[max(0, len(o)-keep):]
	case "pass", "fail", "skip":
		if sub || test == "" && (action != "fail" || s.failedIn(pkg)) {
			return
		}
		s.result[name] = action
		if action != "fail" {
			delete(s.output, name)
		}
	}
}

func (s *scores) failedIn(pkg string) bool {
	for name, result := range s.result {
		if result == "fail" && strings.HasPrefix(name, pkg+".") {
			return true
		}
	}
	return false
}

// copyModule copies etcd's tests into dir, with the proxy in front of each member unless bare, and
// returns a go.mod that uses the copy.
func copyModule(t *testing.T, dir string, bare bool) string {
	t.Helper()
	from := command(t, "go", "list", "-m", "-f", "{{.Dir}}", module)
	to := filepath.Join(dir, "tests")
	for _, part := range []string{"common", "framework", "integration", "fixtures", "go.mod", "go.sum"} {
		command(t, "mkdir", "-p", to)
		command(t, "cp", "-r", "--no-preserve=mode", filepath.Join(from, part), to)
	}
	// It tests a library that is not a published module.
	if err := os.Remove(filepath.Join(to, "integration", "cache_test.go")); err != nil {
		t.Fatal(err)
	}
	framework := filepath.Join(to, "framework", "integration")
	if !bare {
		file := filepath.Join(framework, "cluster.go")
		text := read(t, file)
		for _, e := range edits {
			if n := strings.Count(text, e[0]); n != 1 {
				t.Fatalf("%q stands %d times in %s of %s", e[0], n, file, module)
			}
			text = strings.Replace(text, e[0], e[1], 1)
		}
		write(t, file, text)
		write(t, filepath.Join(framework, "front.go"), read(t, "testdata/front.go"))
	}
	modfile := filepath.Join(dir, "go.mod")
	write(t, modfile, read(t, "go.mod")+fmt.Sprintf("\nreplace %s => %s\n", module, to))
	write(t, filepath.Join(dir, "go.sum"), read(t, "go.sum"))
	return modfile
}

// readKnown reads lines with a test's name and the reason why it fails.
func readKnown(t *testing.T) map[string]string {
	t.Helper()
	known := make(map[string]string)
	for line := range strings.Lines(read(t, "testdata/known.txt")) {
		if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, why, ok := strings.Cut(line, " ")
		if why = strings.TrimSpace(why); !ok || why == "" {
			t.Errorf("testdata/known.txt: %s without a reason", name)
		}
		known[name] = why
	}
	return known
}

func proxyBinary(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("ETCD_KMS_PROXY_BIN")
	if dir == "" {
		dir = filepath.Join("..", "..", ".bin")
	}
	path, err := filepath.Abs(filepath.Join(dir, "etcd-kms-proxy"))
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatalf("find the proxy: %v; run `make build` first", err)
	}
	return path
}

func newKey(t *testing.T, dir string) string {
	t.Helper()
	file := filepath.Join(dir, "key.yaml")
	command(t, proxyBinary(t), "kms", "new-local-key", file)
	return file
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func read(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
