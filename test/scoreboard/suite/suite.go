// Package suite runs the tests of another project with a proxy in front of each of its etcds.
//
// The tests run from a copy of their module, in which the framework that starts etcd starts a proxy
// that encrypts every key as well, and the tests' clients connect to the proxy. The copy is made for
// each run: this repository has only the edits.
package suite

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// Suite describes the tests. Its files are relative to the package that runs it.
type Suite struct {
	Name     string // for the report
	Module   string
	Parts    []string // the files and folders of the module that are copied
	Packages []string // of the module
	Args     []string // for go test
	TestArgs []string // for the test programs

	// Edits put the proxy in front of etcd. They are left out if SCOREBOARD_BARE is set.
	Edits []Edit
	// Files are copied into the module: from a file here to one there. Empty: removed there.
	Files map[string]string

	// Known lists tests that fail, and LeftOut tests that do not run, each with the reason.
	Known, LeftOut string
	// Tests is how many tests a whole run has at least, and Values how many encrypted values their
	// etcds have stored at least.
	Tests, Values int
}

// Edit replaces a text that a file contains exactly once.
type Edit struct{ File, Old, New string }

const (
	timeout = "80m" // of one test program
	repeats = 2     // of a test that failed
)

// Run runs the tests. One that fails with the proxy, also when it is repeated, passes without it, and
// has no known reason, is an error.
func Run(t *testing.T, s Suite) {
	t.Helper()
	if testing.Short() {
		t.Skip("it takes a quarter of an hour: make scoreboard, make scoreboard-kubernetes")
	}
	start := time.Now()
	known, leftOut := readReasons(t, s.Known), readReasons(t, s.LeftOut)
	r := newRun(t, s, os.Getenv("SCOREBOARD_BARE") != "")
	choice, whole := r.choose(t, leftOut)
	got := r.test(t, choice)
	again := r.repeat(t, got, known, choice.skip)
	encrypted := r.report(t, got, known, leftOut, again, time.Since(start))
	if !whole || r.bare {
		return
	}
	if len(got.result) < s.Tests {
		t.Errorf("only %d tests ran, not %d", len(got.result), s.Tests)
	}
	if encrypted < s.Values {
		t.Errorf("the etcds stored only %d values, not %d", encrypted, s.Values)
	}
	for name := range known {
		if result := got.result[name]; result != "fail" {
			t.Logf("%s: %s; %s says that it fails", name, result, s.Known)
		}
	}
}

// run is a copy of the module, with or without proxies.
type run struct {
	Suite
	dir, modfile string
	bare         bool
	key          string // of the proxies
}

func newRun(t *testing.T, s Suite, bare bool) *run {
	t.Helper()
	r := &run{Suite: s, dir: t.TempDir(), bare: bare}
	r.copyModule(t)
	if !bare {
		r.key = newKey(t, r.dir)
	}
	return r
}

// choice is what go test runs: patterns for the tests, and packages.
type choice struct {
	run, skip string
	packages  []string
}

func (r *run) args(c choice) []string {
	args := append([]string{"test", "-modfile", r.modfile}, r.Args...)
	args = append(args, "-json", "-vet=off", "-count=1", "-p=1", "-timeout="+timeout)
	if c.run != "" {
		args = append(args, "-run", c.run)
	}
	if c.skip != "" {
		args = append(args, "-skip", c.skip)
	}
	for _, p := range c.packages {
		args = append(args, r.Module+"/"+p)
	}
	if len(r.TestArgs) > 0 {
		args = append(append(args, "-args"), r.TestArgs...)
	}
	return args
}

// choose returns what runs, and whether that is the whole suite.
func (r *run) choose(t *testing.T, leftOut map[string]string) (c choice, whole bool) {
	t.Helper()
	chosen := strings.Fields(os.Getenv("SCOREBOARD_PACKAGES"))
	shard := os.Getenv("SCOREBOARD_SHARD")
	c.run, c.skip = os.Getenv("SCOREBOARD_RUN"), skipPattern(leftOut)
	for _, p := range r.Packages {
		if len(chosen) == 0 || slices.Contains(chosen, p) {
			c.packages = append(c.packages, p)
		}
	}
	if len(c.packages) == 0 {
		t.Skipf("SCOREBOARD_PACKAGES names no package of %s", r.Name)
	}
	whole = len(chosen) == 0 && c.run == "" && shard == ""
	if shard != "" {
		c.run = r.shard(t, shard, c)
	}
	return c, whole
}

// repeat runs tests again that failed, as a machine with other work fails tests with short
// timeouts. It returns why a failure counts no longer.
func (r *run) repeat(t *testing.T, got *results, known map[string]string, skip string) map[string]string {
	t.Helper()
	again := make(map[string]string)
	for i := range repeats {
		for _, name := range r.test(t, got.toRepeat(known, again, skip)).passed() {
			again[name] = fmt.Sprintf("passes in repetition %d", i+1)
		}
	}
	if c := got.toRepeat(known, again, skip); len(c.packages) > 0 && !r.bare {
		for name, result := range newRun(t, r.Suite, true).test(t, c).result {
			if result == "fail" {
				again[name] = "fails without the proxy too"
			}
		}
	}
	return again
}

// toRepeat chooses the tests that failed for no known reason.
func (r *results) toRepeat(known, again map[string]string, skip string) choice {
	c := choice{skip: skip}
	var tests []string
	for _, name := range slices.Sorted(maps.Keys(r.result)) {
		pkg, test, _ := strings.Cut(name, ".")
		if r.result[name] != "fail" || test == "" || known[name] != "" || again[name] != "" {
			continue
		}
		if !slices.Contains(c.packages, pkg) {
			c.packages = append(c.packages, pkg)
		}
		tests = append(tests, test)
	}
	c.run = "^(" + strings.Join(tests, "|") + ")$"
	return c
}

// shard returns a pattern for the tests of one part of several, for example of 2/3. Tests of one
// name are in the same part.
func (r *run) shard(t *testing.T, shard string, c choice) string {
	t.Helper()
	var part, of int
	if n, err := fmt.Sscanf(shard, "%d/%d", &part, &of); n != 2 || err != nil || part < 1 || part > of {
		t.Fatalf("SCOREBOARD_SHARD=%s is not like 2/3", shard)
	}
	want, err := regexp.Compile(c.run)
	if err != nil {
		t.Fatal(err)
	}
	list := append([]string{"test", "-modfile", r.modfile}, r.Args...)
	list = append(list, "-list", ".")
	for _, p := range c.packages {
		list = append(list, r.Module+"/"+p)
	}
	names := make(map[string]bool)
	for name := range strings.Lines(command(t, "go", list...)) {
		name = strings.TrimSpace(name)
		if (strings.HasPrefix(name, "Test") || strings.HasPrefix(name, "Example")) && want.MatchString(name) {
			names[name] = true
		}
	}
	var chosen []string
	for i, name := range slices.Sorted(maps.Keys(names)) {
		if i%of == part-1 {
			chosen = append(chosen, name)
		}
	}
	return "^(" + strings.Join(chosen, "|") + ")$"
}

// skipPattern is for go test -skip. The names are without their packages, because go test has one
// pattern for all.
func skipPattern(leftOut map[string]string) string {
	var patterns []string
	for _, name := range slices.Sorted(maps.Keys(leftOut)) {
		_, test, _ := strings.Cut(name, ".")
		var levels []string
		for level := range strings.SplitSeq(test, "/") {
			levels = append(levels, "^"+regexp.QuoteMeta(level)+"$")
		}
		patterns = append(patterns, strings.Join(levels, "/"))
	}
	return strings.Join(patterns, "|")
}

// test runs the tests of a choice, which may be none.
func (r *run) test(t *testing.T, c choice) *results {
	t.Helper()
	got := &results{result: make(map[string]string), output: make(map[string]string), logging: make(map[string]bool)}
	if len(c.packages) == 0 {
		return got
	}
	args := r.args(c)
	cmd := exec.CommandContext(t.Context(), "go", args...)
	// A test creates its sockets, whose paths must be short, in its folder. Files that it leaves
	// are removed with the copy.
	cmd.Env = append(os.Environ(), "GOFLAGS=", "TMPDIR="+r.dir, "SCOREBOARD_RECORD="+r.record())
	if !r.bare {
		cmd.Env = append(cmd.Env, "SCOREBOARD_PROXY="+proxyBinary(t), "SCOREBOARD_KEY="+r.key)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(io.TeeReader(out, r.all(t)))
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e struct{ Action, Package, ImportPath, Test, Output string }
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			continue
		}
		if e.Action == "build-output" {
			errs.WriteString(e.Output)
		}
		got.note(strings.TrimPrefix(e.Package, r.Module+"/"), e.Test, e.Action, e.Output)
	}
	err = cmd.Wait()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited || len(got.result) == 0 {
		t.Fatalf("go %q: %v\n%s", args, err, errs.Bytes())
	}
	if errs.Len() > 0 {
		t.Logf("%s", errs.Bytes())
	}
	return got
}

// all is where the complete output goes.
func (r *run) all(t *testing.T) io.Writer {
	t.Helper()
	file := os.Getenv("SCOREBOARD_OUTPUT")
	if file == "" {
		return io.Discard
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func (r *run) record() string { return filepath.Join(r.dir, "record") }

const keep = 8 << 10 // the last bytes of a test's output

// results are those of top-level tests, by package and name.
type results struct {
	result map[string]string
	output map[string]string // by test and subtest
	failed []string          // also subtests

	logging map[string]bool // a test is in the middle of a log record
}

// note counts a top-level test by its own result. A package that fails without a failed test, for
// example because it does not build, counts as one.
func (r *results) note(pkg, test, action, output string) {
	name := pkg + "." + test
	switch action {
	case "output":
		if r.logging[name] = r.logging[name] || strings.Contains(output, " logger.go:"); r.logging[name] {
			// A log record, which may be cut into several pieces of output.
			r.logging[name] = !strings.HasSuffix(output, "\n")
			return
		}
		o := r.output[name] + output
		r.output[name] = o[max(0, len(o)-keep):]
	case "pass", "fail", "skip":
		// etcd's framework skips all tests after one that has left goroutines.
		if action == "skip" && strings.Contains(r.output[name], "Found leaked goroutin") {
			action = "fail"
		}
		if action == "pass" {
			delete(r.output, name)
		}
		if action == "fail" && test != "" {
			r.failed = append(r.failed, name)
		}
		if !strings.Contains(test, "/") && (test != "" || action == "fail" && !r.failedIn(pkg)) {
			r.result[name] = action
		}
	}
}

// outputOf is the output of a test that failed: its own, and that of its subtests that failed.
func (r *results) outputOf(name string) string {
	text := r.output[name]
	for _, sub := range r.failed {
		if strings.HasPrefix(sub, name+"/") {
			text += r.output[sub]
		}
	}
	return text
}

func (r *results) failedIn(pkg string) bool {
	for name, result := range r.result {
		if result == "fail" && strings.HasPrefix(name, pkg+".") {
			return true
		}
	}
	return false
}

func (r *results) passed() []string {
	var names []string
	for name, result := range r.result {
		if result == "pass" {
			names = append(names, name)
		}
	}
	return names
}

// report prints the counts, and reports failures and plaintext. It returns how many encrypted values
// the etcds stored.
func (r *run) report(t *testing.T, got *results, known, leftOut, again map[string]string, took time.Duration) (encrypted int) {
	t.Helper()
	counts := make(map[string]int)
	for _, result := range got.result {
		counts[result]++
	}
	proxies, encrypted, plaintext := r.readRecord(t)
	t.Logf("%s: %d pass, %d fail, %d skipped by themselves, of %d; %d left out; %d proxies; %d encrypted values in the files of etcd; %s",
		r.Name, counts["pass"], counts["fail"], counts["skip"], len(got.result), len(leftOut), proxies, encrypted, took.Round(time.Second))
	for _, name := range slices.Sorted(maps.Keys(got.result)) {
		switch {
		case got.result[name] == "skip":
			t.Logf("%s skips itself: %s", name, lastLine(got.output[name]))
		case got.result[name] != "fail":
		case known[name] != "":
			t.Logf("%s fails, as is known: %s", name, known[name])
		case again[name] != "":
			t.Logf("%s failed, and %s\n%s", name, again[name], got.outputOf(name))
		default:
			t.Errorf("%s\n%s", name, got.outputOf(name))
		}
	}
	for _, p := range plaintext {
		t.Errorf("etcd stored plaintext: %s", p)
	}
	return encrypted
}

// lastLine is the reason that a test gives before it skips itself.
func lastLine(output string) string {
	var last string
	for line := range strings.Lines(output) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "---") {
			last = line
		}
	}
	return last
}

// readRecord returns how many proxies were started, and what the etcds stored.
func (r *run) readRecord(t *testing.T) (proxies, encrypted int, plaintext []string) {
	t.Helper()
	text, err := os.ReadFile(r.record())
	if err != nil && !r.bare {
		t.Fatalf("no proxy was started: %v", err)
	}
	for line := range bytes.Lines(text) {
		var what, name, key string
		var with, without int
		fields := []any{&what, &name, &with, &without, &key}
		if err := json.Unmarshal(line, &fields); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		switch {
		case what == "proxy":
			proxies++
		case without > 0:
			plaintext = append(plaintext, fmt.Sprintf("%s: %d values, for example at the key %q", name, without, key))
		}
		encrypted += with
	}
	return proxies, encrypted, plaintext
}

// copyModule copies the tests, with a proxy in front of each etcd unless bare, and makes a go.mod
// that uses the copy.
func (r *run) copyModule(t *testing.T) {
	t.Helper()
	from := command(t, "go", "list", "-m", "-f", "{{.Dir}}", r.Module)
	to := filepath.Join(r.dir, "m")
	for _, part := range append(r.Parts, "go.mod") {
		command(t, "mkdir", "-p", filepath.Join(to, filepath.Dir(part)))
		command(t, "cp", "-r", "--no-preserve=mode", filepath.Join(from, part), filepath.Join(to, part))
	}
	for file, source := range r.Files {
		file = filepath.Join(to, file)
		switch {
		case source == "":
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		case !r.bare:
			command(t, "mkdir", "-p", filepath.Dir(file))
			write(t, file, read(t, source))
		}
	}
	for _, e := range r.Edits {
		if r.bare {
			break
		}
		file := filepath.Join(to, e.File)
		text := read(t, file)
		if n := strings.Count(text, e.Old); n != 1 {
			t.Fatalf("%s of %s has %d times, not once: %s", e.File, r.Module, n, e.Old)
		}
		write(t, file, strings.Replace(text, e.Old, e.New, 1))
	}
	gomod := command(t, "go", "env", "GOMOD")
	r.modfile = filepath.Join(r.dir, "go.mod")
	write(t, r.modfile, read(t, gomod)+fmt.Sprintf("\nreplace %s => %s\n", r.Module, to))
	write(t, filepath.Join(r.dir, "go.sum"), read(t, path.Join(path.Dir(gomod), "go.sum")))
}

// readReasons reads lines with the name of a test, and the reason why it is in the file.
func readReasons(t *testing.T, file string) map[string]string {
	t.Helper()
	reasons := make(map[string]string)
	if file == "" {
		return reasons
	}
	for line := range strings.Lines(read(t, file)) {
		if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, why, ok := strings.Cut(line, " ")
		if why = strings.TrimSpace(why); !ok || why == "" {
			t.Errorf("%s: %s without a reason", file, name)
		}
		reasons[name] = why
	}
	return reasons
}

func proxyBinary(t *testing.T) string {
	t.Helper()
	return Binary(t, "etcd-kms-proxy", "make build")
}

// Binary is a program that make has built.
func Binary(t *testing.T, name, how string) string {
	t.Helper()
	dir := os.Getenv("ETCD_KMS_PROXY_BIN")
	if dir == "" {
		dir = filepath.Join(filepath.Dir(command(t, "go", "env", "GOMOD")), "..", "..", ".bin")
	}
	file, err := filepath.Abs(filepath.Join(dir, name))
	if err == nil {
		_, err = os.Stat(file)
	}
	if err != nil {
		t.Fatalf("find %s: %v; run `%s` first", name, err, how)
	}
	return file
}

func newKey(t *testing.T, dir string) string {
	t.Helper()
	file := filepath.Join(dir, "key.yaml")
	command(t, proxyBinary(t), "kms", "new-local-key", file)
	return file
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, errs.Bytes())
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
